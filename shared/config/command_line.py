"""From the words of a command line to a checked configuration."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from shared.config.arguments import Assignment, read_arguments, value_of
from shared.config.flags import Backend, Flag
from shared.config.help_text import help_text
from shared.config.options import FLAGS, SECRETS, TrainConfig
from shared.config.validation import validate
from shared.config.yaml_io import read_yaml, to_yaml
from shared.outgoing.messages import outgoing, with_indented_lines
from shared.outgoing.redaction import keep_secret
from shared.user_errors import UserError

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
        config, others = _resolve(argv, {})
        validate(config, backend)
    except ValueError as error:
        sys.stderr.write(with_indented_lines(outgoing(f"{program}: error: {error}")) + "\n")
        raise SystemExit(2) from None
    if others.get("print_config"):
        sys.stdout.write(to_yaml(config))
        raise SystemExit(0)
    return config


def read_configuration(argv: Sequence[str]) -> TrainConfig:
    """What these flags, and the --config file among them, say; `validate` is left to the caller.

    Raises:
        UserError: an unknown flag, a value of the wrong type, or --print_config.
    """
    return read_beside_own_flags(argv, {})[0]


def read_beside_own_flags(argv: Sequence[str], own: dict[str, Flag]) -> tuple[TrainConfig, dict[str, Any]]:
    """`read_configuration` for programs that have flags of their own beside those of a training.

    Returns:
        The configuration, and the values of those of the program's own flags that were given.
    """
    config, others = _resolve(argv, own)
    if others.get("print_config"):
        raise UserError(
            "--print_config is a flag of train_flax.py and train_torch.py, not of this program: leave it out."
        )
    return config, {name: value for name, value in others.items() if name in own}


def _resolve(argv: Sequence[str], own: dict[str, Flag]) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration, not validated yet, and what was given beside it: commands, and a program's own flags."""
    beside = _COMMANDS | own
    given = read_arguments(argv, FLAGS | beside)
    _keep_secrets(given)
    others = _values([assignment for assignment in given if assignment.name in beside], beside)
    assignments = [assignment for assignment in given if assignment.name not in beside]
    if "config" in others:
        from_file = read_yaml(others["config"], FLAGS)
        _keep_secrets(from_file)
        assignments = from_file + assignments
    values = _values(assignments, FLAGS)
    if "output_dir" in values:
        values["output_dir"] = values["output_dir"].replace("{timestamp}", time.strftime("%Y%m%d_%H%M%S"))
    return TrainConfig(**values), others


def _values(assignments: Sequence[Assignment], flags: dict[str, Flag]) -> dict[str, Any]:
    return {assignment.name: value_of(assignment, flags[assignment.name]) for assignment in assignments}


def _keep_secrets(assignments: Sequence[Assignment]) -> None:
    for assignment in assignments:
        if assignment.name in SECRETS:
            for text in assignment.texts or ():
                keep_secret(text)
