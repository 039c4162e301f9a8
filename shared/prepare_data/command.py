"""From the words of a command line to a subcommand and its checked options."""

import importlib
import itertools
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from shared.config.arguments import read_arguments, suggestion, value_of
from shared.config.flags import Flag, flags_of
from shared.config.help_text import LARGEST_WIDTH, flag_sections
from shared.config.validation import DATA_SOURCES, check_sources, check_values
from shared.outgoing.messages import set_up_logging
from shared.outgoing.redaction import described
from shared.prepare_data.handing_on import hand_to_torch
from shared.prepare_data.options import (
    AnnotateOptions,
    CacheOptions,
    CaptionOptions,
    CheckOptions,
    ImageOptions,
    IndexOptions,
    PackOptions,
    ShowOptions,
)
from shared.run.interruption import exit_code_of
from shared.user_errors import UserError

_PROGRAM = "python3 -m shared.prepare_data"


@dataclass(frozen=True)
class Subcommand:
    """What can be done with data. Its module has `run(options)`, or `run(options, shards)`, that gives an exit code.

    One that hands on has `run(words)`: the flags are those of another program, and `options` are no more than its own.
    `caption`, and `annotate` for some conditions, need a model: after their flags are checked the words are handed to
    PyTorch's program, which reads them again and calls the module's `run_with_model`.
    A module is imported when it is asked for: a mistake in the flags need not wait for libraries.
    """

    does: str
    about: str
    options: type
    module: str
    takes_shards: bool = False
    hands_on: bool = False

    @property
    def flags(self) -> dict[str, Flag]:
        return flags_of(self.options)


SUBCOMMANDS = {
    "index": Subcommand(
        "Write the index of shards that lets a training start at once, and read them in any order.",
        "Reads the headers of uncompressed local tars, img2dataset's too, and writes FIRST_SHARD.shard_index beside "
        "them. A training on these shards, or on some of them, finds it by itself. Shards that an earlier index knows, "
        "and that have not changed, are not read again. Remote shards are read whole, once; their index goes to "
        "--output_file, and from there, by you, beside them. SHARDS are paths or addresses with {000..127} ranges, "
        "paths with * patterns too.",
        IndexOptions,
        "shared.prepare_data.indexing",
        takes_shards=True,
    ),
    "pack": Subcommand(
        "Make shards, with an index, from any data that a training reads.",
        "Bad samples are left out and named. Killed at any time, the same command goes on where it was, and leaves the "
        "same bytes. --output_dir/packed.json says what was packed, how, and what was left out.",
        PackOptions,
        "shared.prepare_data.packing",
    ),
    "annotate": Subcommand(
        "Pack images and captions with a condition that is made of each image.",
        "canny: edges by OpenCV, each image's thresholds its own; grey: lightness; blur; palette: colours of 64 px "
        "squares; tile: the image, small and enlarged again; inpaint: the image with black rectangles. Models in "
        "PyTorch make the others: depth, segmentation (in ADE20K's colours), pose (OpenPose), soft_edges (HED), "
        "landmarks (of faces). The data need no conditions. What is random is decided by --seed and the sample's "
        "number. Otherwise as pack.",
        AnnotateOptions,
        "shared.prepare_data.annotating",
    ),
    "caption": Subcommand(
        "Pack images with captions that BLIP writes.",
        "The data need no captions, and conditions are kept where there are any (annotate makes them). A model in "
        "PyTorch looks at the images. Otherwise as pack.",
        CaptionOptions,
        "shared.prepare_data.captioning",
    ),
    "cache": Subcommand(
        "Encode images and captions once, for a training with --cached_data.",
        "Takes the flags of a training (see train_flax.py --help), of which those count that say what a step sees: the "
        "base model, the data, --resolution and how pictures are resized to it, --conditioning_channels, "
        "--mixed_precision, the format of what is kept. --train_batch_size images are encoded at once on each device. "
        "--output_dir is the folder of the cache. Stopped at any time, the same command goes on where it was.",
        CacheOptions,
        "shared.prepare_data.handing_on",
        hands_on=True,
    ),
    "check": Subcommand(
        "List the samples that are corrupt, mismatched, duplicated or of an unusual size.",
        "Reads and decodes every sample. Exit code: 0 nothing was found, 1 something was, 2 the data cannot be read.",
        CheckOptions,
        "shared.prepare_data.checking",
    ),
    "show": Subcommand(
        "Draw a contact sheet of samples with their captions.",
        "Conditions stand beside their images, cropped as a training crops them.",
        ShowOptions,
        "shared.prepare_data.showing",
    ),
}


@dataclass(frozen=True)
class Command:
    """A subcommand with its checked options, and the shards given to it."""

    subcommand: Subcommand
    options: Any
    shards: tuple[str, ...]


def main(words: Sequence[str]) -> int:
    """0: done; 1: `check` found something, or a defect; 2: a mistake of the user, told in a sentence; 130: Ctrl-C."""
    return exit_code_of(partial(_main, words))


def _main(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help") or "--help" in words:
        sys.stdout.write(help_text(words))
        return 0
    subcommand = _subcommand(words[0])
    if subcommand.hands_on:
        return int(importlib.import_module(subcommand.module).run(words[1:]))
    command = read_command(words)
    return hand_to_torch(words) if _needs_a_model(command.options) else _run(command)


def read_command(words: Sequence[str]) -> Command:
    """What the words after the program's name ask for; no file is read.

    Raises:
        UserError: for the first mistake found.
    """
    subcommand, rest = _subcommand(words[0]), words[1:]
    shards = tuple(itertools.takewhile(lambda word: not word.startswith("--"), rest))
    if subcommand.takes_shards and not shards:
        raise UserError(f"{words[0]} needs the shards: {_PROGRAM} {words[0]} 'DIR/{{000..127}}.tar'")
    if shards and not subcommand.takes_shards:
        raise UserError(f"{described(shards[0])} is no flag; the data are named by flags, such as --train_data_dir.")
    flags = subcommand.flags
    given = read_arguments(rest[len(shards) :], flags)
    values = {assignment.name: value_of(assignment, flags[assignment.name]) for assignment in given}
    options = subcommand.options(**values)
    check_values(options, flags)
    for name, declared in flags.items():
        other = declared.only_with
        if isinstance(options, ImageOptions) and other and values.get(name) is not None and not values.get(other):
            raise UserError(f"--{name} is about --{other}, which is not given: give that too, or leave it out.")
    if isinstance(options, ImageOptions):
        check_sources(options.training(), [name for name in DATA_SOURCES if name in flags])
    return Command(subcommand, options, shards)


def help_text(words: Sequence[str]) -> str:
    """Of the subcommand that is among the words, or of all; as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, LARGEST_WIDTH)
    named = next((word for word in words if not word.startswith("-")), None)
    if named is None:
        usage = f"usage: {_PROGRAM} SUBCOMMAND [--flag value ...]"
        listed = [f"  {name:<8}{subcommand.does}" for name, subcommand in SUBCOMMANDS.items()]
        return "\n".join([usage, "", "subcommands:", *listed, "", "SUBCOMMAND --help lists its flags."]) + "\n"
    subcommand = _subcommand(named)
    shards = "SHARDS ... " if subcommand.takes_shards else ""
    usage = f"usage: {_PROGRAM} {named} {shards}[--flag value ...]"
    about = textwrap.fill(f"{subcommand.does} {subcommand.about}", width)
    flags = subcommand.flags  # none of which a backend honours in its own way
    groups = list(dict.fromkeys(declared.group for declared in flags.values()))
    in_groups = dict(sorted(flags.items(), key=lambda item: groups.index(item[1].group)))
    return "\n\n".join([usage, about, *flag_sections(in_groups, "flax", width)]) + "\n"


def _subcommand(word: str) -> Subcommand:
    if word not in SUBCOMMANDS:
        closest = suggestion(word, SUBCOMMANDS)
        hint = f"did you mean {closest}?" if closest else f"expected one of {', '.join(SUBCOMMANDS)}."
        raise UserError(f"{described(word)} is no subcommand; {hint}")
    return SUBCOMMANDS[word]


def _needs_a_model(options: Any) -> bool:
    if isinstance(options, AnnotateOptions):
        return options.model_condition is not None
    return isinstance(options, CaptionOptions)


def _run(command: Command) -> int:
    set_up_logging("shared")
    run = importlib.import_module(command.subcommand.module).run
    return int(run(command.options, command.shards) if command.subcommand.takes_shards else run(command.options))
