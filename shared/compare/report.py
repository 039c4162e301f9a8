"""What a comparison uses of a run's report.json, held against what is declared here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from shared.untrusted import MIB, read_json, shown
from shared.untrusted.documents import convert
from shared.user_errors import UserError

UNTRAINED = "_untrained"
"""What a figure's name ends with where it is of the untrained model."""

MOST_STEPS = 10**12
"""More than any run has, and exact in every kind of number that a step becomes."""

_LARGEST = 4 * MIB  # of some kilobytes, unless prompts in the command are very long
_MOST_FIGURES = 100  # on held-out samples; a run has about ten
_LONGEST_NAME = 100  # characters of a figure's name
_REQUIRED = ("backend", "steps", "global_batch_size")

Count = Annotated[int, Meta(ge=0, le=MOST_STEPS)]


@dataclass(frozen=True)
class Report:
    """report.json. None is what was not known.

    Attributes:
        convergence_step: UNSET where nothing was measured that could say it.
        figures: those on held-out samples, by name; each twice, once of the untrained model.
    """

    backend: Literal["flax", "torch"]
    steps: Count
    global_batch_size: Annotated[int, Meta(ge=1, le=MOST_STEPS)]
    images_seen: Annotated[int, Meta(ge=0, le=2**62)] | None = None
    seconds_total: float | None = None
    devices: str | None = None
    versions: dict[str, str | None] | None = None
    command: str | None = None
    peak_host_memory_gib: float | None = None
    peak_device_memory_gib: float | None = None
    convergence_step: Count | UnsetType | None = UNSET
    figures: dict[str, float | None] = field(default_factory=dict)

    @property
    def evaluation_names(self) -> list[str]:
        """The figures on held-out samples, each once."""
        return [name for name in self.figures if f"{name}{UNTRAINED}" in self.figures]


def read_report(path: Path) -> Report:
    """Read report.json.

    Raises:
        UserError: it cannot be read, is no report, or one of another version of this project.
    """
    fix = f"The files in {shown(path.parent)} are damaged: copy them again, or run the training again."
    values: dict[str, Any] = read_json(path, fix=fix, limit=_LARGEST)
    missing = sorted(set(_REQUIRED) - set(values))
    if missing:
        raise UserError(
            f"{shown(path)} lacks {', '.join(missing)}: another version of this project wrote it. "
            "Run the training again with this one."
        )
    return convert(values | {"figures": _figures(values, path, fix)}, Report, where=str(path), fix=fix)


def _figures(values: dict[str, Any], path: Path, fix: str) -> dict[str, Any]:
    pairs = [name for name in values if f"{name}{UNTRAINED}" in values]
    if len(pairs) > _MOST_FIGURES:
        raise UserError(f"{shown(path)} has {len(pairs)} figures on held-out samples, expected about ten. {fix}")
    for name in pairs:
        if len(name) > _LONGEST_NAME:
            raise UserError(f"{shown(path)} has a figure with a name of {len(name)} characters. {fix}")
    return {one: values[one] for name in pairs for one in (name, f"{name}{UNTRAINED}")}
