"""The text of --help."""

import itertools
import shutil
import textwrap
from collections.abc import Mapping

from shared.config.flags import Backend, Flag, Missing
from shared.config.options import FLAGS
from shared.config.support import BACKEND_NAMES

_PLACEHOLDERS = {int: "INT", float: "FLOAT", str: "TEXT"}
LARGEST_WIDTH = 120
_INTRODUCTION = (
    "Trains a ControlNet for Stable Diffusion. --pretrained_model_name_or_path and one source of data are needed "
    "(--dataset_name, --train_data_dir, --train_shards or --generated_circles). With no flags at all, a small "
    "built-in demo runs."
)
_CONVENTIONS = (
    "Write --flag value or --flag=value. A switch is turned off again by --no_ before its name, as --no_streaming. "
    "Where a flag is repeated, the last one counts. A step is an optimizer step."
)
_COMMANDS = (
    ("--help", "Print this text and exit."),
    (
        "--config FILE",
        "Read flags from a YAML file with one `flag: value` per line; the command line wins over the file.",
    ),
    ("--print_config", "Print the resolved configuration as YAML and exit; --config can read it back."),
)


def help_text(program: str, backend: Backend) -> str:
    """All flags with their meanings and defaults, as wide as the terminal, up to 120 columns."""
    width = min(shutil.get_terminal_size().columns, LARGEST_WIDTH)
    intro = [textwrap.fill(text, width) for text in (_INTRODUCTION, _CONVENTIONS)]
    sections = [_section("commands", [_entry(head, text, width) for head, text in _COMMANDS])]
    sections += flag_sections(FLAGS, backend, width)
    return "\n\n".join([f"usage: {program} [--flag value ...]", *intro, *sections]) + "\n"


def command_help(command: str, introduction: str, flags: Mapping[str, Flag], backend: Backend) -> str:
    """Of another command than a training, in the same form."""
    width = min(shutil.get_terminal_size().columns, LARGEST_WIDTH)
    sections = flag_sections(flags, backend, width)
    usage = f"usage: {command} [--flag value ...]"
    return "\n\n".join([usage, textwrap.fill(introduction, width), *sections]) + "\n"


def flag_sections(declared: Mapping[str, Flag], backend: Backend, width: int) -> list[str]:
    """Flags with their meanings and defaults, a section for each group."""
    return [
        _section(group, [_entry(_heading(flag), _body(flag, backend), width) for flag in flags])
        for group, flags in itertools.groupby(declared.values(), key=lambda flag: flag.group)
    ]


def default_text(flag: Flag) -> str:
    """The default as it would be given; of a flag that has one."""
    return " ".join(map(str, flag.default)) if flag.is_list else f"{flag.default}"


def _section(title: str, entries: list[str]) -> str:
    return "\n".join([f"{title}:", *entries])


def _entry(heading: str, body: str, width: int) -> str:
    return f"  {heading}\n" + textwrap.fill(
        body, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False
    )


def _heading(flag: Flag) -> str:
    if flag.kind is bool:
        return f"--{flag.name}"
    placeholder = _PLACEHOLDERS[flag.kind]
    return f"--{flag.name} {placeholder}" + f" [{placeholder} ...]" * flag.is_list


def _body(flag: Flag, backend: Backend) -> str:
    choices = f" One of {', '.join(flag.choices)}." if flag.choices else ""
    default = "not set" if flag.default is None else "off" if flag.kind is bool else default_text(flag)
    support, fact = "", flag.in_backend(backend)
    if isinstance(fact, Missing):
        what = "Not" if fact.value is None else f"{fact.value} is not"
        support = f" {what} supported yet by the {BACKEND_NAMES[backend]} backend."
    return f"{flag.help}{choices} (Default: {default}.){support}"
