"""What `python3 -m shared.compare` is asked to do: train with both backends, or only compare two run folders."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.config import parse_command_line
from shared.config.demo import demo_arguments
from shared.untrusted import shown
from shared.user_errors import UserError

PAGE_NAME = "comparison.html"

USAGE = """\
usage: python3 -m shared.compare --output_dir DIR [flags of train_flax.py and train_torch.py]
       python3 -m shared.compare RUN_A RUN_B [--output_dir DIR]

The first trains with Flax, then with PyTorch, into DIR/flax and DIR/torch, and writes DIR/comparison.html. With no flag
but --output_dir both train the built-in demo. The second compares two finished run folders, of whatever backends; its
page goes to DIR/comparison.html, or beside RUN_A as comparison_RUN_A_RUN_B.html.

Exit code: 0 the runs agree (every logged loss and the final ControlNet to 1e-3 relative), 1 they do not, 2 they cannot
be compared.
"""

_OUTPUT_DIR = "--output_dir"


@dataclass(frozen=True)
class TrainBoth:
    """Train twice with the same flags, which say everything but where to."""

    flags: tuple[str, ...]
    output_dir: Path


@dataclass(frozen=True)
class CompareFolders:
    """Compare two finished runs and write the page."""

    run_a: Path
    run_b: Path
    page: Path


def read_command(words: Sequence[str]) -> TrainBoth | CompareFolders:
    """What the words after `python3 -m shared.compare` ask for. Flags are checked for both backends, files are not.

    Raises:
        UserError: neither of the two usages.
        SystemExit: with 2 where a backend does not understand the training flags, after saying why on stderr.
    """
    if not words:
        raise UserError(f"Nothing to compare was given.\n{USAGE}")
    if any("\0" in word for word in words):
        raise UserError("A word of the command holds a NUL, which no folder's name does.")
    folders = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
    return _compare_folders(folders, words[len(folders) :]) if folders else _train_both(words)


def _compare_folders(folders: Sequence[str], rest: Sequence[str]) -> CompareFolders:
    if len(folders) != 2:
        raise UserError(
            f"{len(folders)} run folders are given ({', '.join(map(shown, folders))}); a comparison takes two."
        )
    run_a, run_b = map(Path, folders)
    if not rest:
        place_a, place_b = (Path(os.path.realpath(run)) for run in (run_a, run_b))
        return CompareFolders(run_a, run_b, place_a.parent / f"comparison_{place_a.name}_{place_b.name}.html")
    name, equals, value = rest[0].partition("=")
    values = [value, *rest[1:]] if equals else rest[1:]
    if name != _OUTPUT_DIR or len(values) != 1:
        raise UserError(
            f"After two run folders comes nothing, or --output_dir with one folder; given were {len(rest)} words. "
            "Training flags belong to the usage without run folders."
        )
    return CompareFolders(run_a, run_b, Path(values[0]) / PAGE_NAME)


def _train_both(words: Sequence[str]) -> TrainBoth:
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    flags = tuple(words) if given - {_OUTPUT_DIR} else (*demo_arguments(), *words)
    config = parse_command_line(flags, "flax")
    parse_command_line(flags, "torch")
    if config.push_to_hub:
        raise UserError("--push_to_hub would upload both runs to one repository. Leave it out, and upload one later.")
    return TrainBoth(flags, Path(config.output_dir))
