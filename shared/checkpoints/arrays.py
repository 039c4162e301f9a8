"""Which arrays a checkpoint should hold, compared with those it says it holds before any is read."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from shared.untrusted import shown
from shared.user_errors import UserError

_DIFFERENCES_SHOWN = 5
_MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "mu", "nu"})
_AVERAGES = frozenset({"average", "ema"})


class Layout(NamedTuple):
    """`dtype` as numpy calls it."""

    dtype: str
    shape: tuple[int, ...]


def check_layouts(checkpoint: Path, saved: Mapping[str, Layout], expected: Mapping[str, Layout]) -> None:
    """Compare arrays by their names, such as `params/conv_in.weight` or `exp_avg/conv_in.weight`.

    Raises:
        UserError: naming what is missing, what is too much, and what has another type or shape.
    """
    different = [name for name in sorted({*saved, *expected}) if saved.get(name) != expected.get(name)]
    if not different:
        return
    if all(name not in saved and _tree(name) in _MOMENTS | _AVERAGES for name in different):
        raise UserError(
            f"{shown(checkpoint)} lacks {_in_words(different[0])}{_and_more(different)}: it is damaged, or another "
            "program wrote it. Resume from another checkpoint."
        )
    differences = (
        f"{shown(name)}: {_text(saved.get(name))} in the checkpoint, {_text(expected.get(name))} expected"
        for name in different[:_DIFFERENCES_SHOWN]
    )
    raise UserError(
        f"{shown(checkpoint)} {_reason(different, saved, expected)}; {len(different)} arrays differ:\n  "
        + "\n  ".join(differences)
        + "\nGive the base model of the checkpoint, or start a new run in another --output_dir."
    )


def _reason(different: Iterable[str], saved: Mapping[str, Layout], expected: Mapping[str, Layout]) -> str:
    only_types = all(
        name in saved and name in expected and saved[name].shape == expected[name].shape for name in different
    )
    return (
        "holds numbers of other types than this version writes"
        if only_types
        else "belongs to a ControlNet of another architecture"
    )


def _in_words(name: str) -> str:
    tree, parameter = _tree(name), shown(name.partition("/")[2])
    return f"the moving average of {parameter}" if tree in _AVERAGES else f"the moment {tree} of {parameter}"


def _tree(name: str) -> str:
    return name.partition("/")[0]


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} arrays more" if len(names) > 1 else ""


def _text(layout: Layout | None) -> str:
    return "nothing" if layout is None else shown(f"{layout.dtype} {list(layout.shape)}")
