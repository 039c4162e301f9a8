"""The command line is a promise: a change to it has to be made here, in plain text, too."""

import pathlib

from shared.config.options import FLAGS

_FROZEN = pathlib.Path(__file__).with_name("command_line.txt")


def _line(name: str) -> str:
    flag = FLAGS[name]
    return " | ".join([name, flag.type_name, repr(flag.default), ",".join(flag.choices) or "-"])


def test_flags_types_defaults_and_choices_are_those_of_the_checked_in_list() -> None:
    frozen = [line for line in _FROZEN.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert [_line(name) for name in sorted(FLAGS)] == frozen
