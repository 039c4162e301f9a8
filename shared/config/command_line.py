"""From the words of a command line to a checked configuration."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from shared.config.arguments import Assignment, read_arguments, value_of
from shared.config.flags import Flag
from shared.config.help_text import help_text
from shared.config.options import FLAGS, Backend, TrainConfig
from shared.config.validation import validate
from shared.config.yaml_io import read_yaml, to_yaml

# They act on the command line itself, so they are flags but no part of the configuration.
_COMMANDS = {
    "help": Flag("help", bool, False, False, (), False, "commands", ""),
    "config": Flag("config", str, False, True, (), None, "commands", ""),
    "print_config": Flag("print_config", bool, False, False, (), False, "commands", ""),
}


def parse_command_line(argv: Sequence[str], backend: Backend) -> TrainConfig:
    """The configuration that a command line asks for, checked for the backend.

    Later flags win over earlier ones, and all of them over the file that --config names. `{timestamp}` in the output
    directory becomes the local time, as 20230411_165612. Nothing but the --config file is read.

    Args:
        argv: the words after the program's name.
        backend: the backend that will run it.

    Raises:
        SystemExit: with 0 after --help or --print_config, which print on stdout; with 2 after a mistake of the user,
            explained in one message on stderr.
    """
    program = f"train_{backend}.py"
    if "--help" in argv or list(argv) == ["-h"]:
        sys.stdout.write(help_text(program, backend))
        raise SystemExit(0)
    try:
        config, is_to_be_printed = _resolve(argv)
        validate(config, backend)
    except ValueError as error:
        sys.stderr.write(f"{program}: error: {error}\n")
        raise SystemExit(2) from None
    if is_to_be_printed:
        sys.stdout.write(to_yaml(config))
        raise SystemExit(0)
    return config


def read_configuration(argv: Sequence[str]) -> TrainConfig:
    """What these flags, and the --config file among them, say; `validate` is left to the caller.

    For programs that have flags of their own beside those of a training.

    Raises:
        ValueError: an unknown flag, a value of the wrong type, or --print_config.
    """
    config, is_to_be_printed = _resolve(argv)
    if is_to_be_printed:
        raise ValueError(
            "--print_config is a flag of train_flax.py and train_torch.py, not of this program: leave it out."
        )
    return config


def _resolve(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    """The configuration, not validated yet, and whether it is to be printed."""
    given = read_arguments(argv, FLAGS | _COMMANDS)
    commands = _values([assignment for assignment in given if assignment.name in _COMMANDS])
    assignments = [assignment for assignment in given if assignment.name not in _COMMANDS]
    if "config" in commands:
        assignments = read_yaml(commands["config"], FLAGS) + assignments
    values = _values(assignments)
    if "output_dir" in values:
        values["output_dir"] = values["output_dir"].replace("{timestamp}", time.strftime("%Y%m%d_%H%M%S"))
    return TrainConfig(**values), commands.get("print_config", False)


def _values(assignments: Sequence[Assignment]) -> dict[str, Any]:
    flags = FLAGS | _COMMANDS
    return {assignment.name: value_of(assignment, flags[assignment.name]) for assignment in assignments}
