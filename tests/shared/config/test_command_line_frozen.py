"""The command line is a promise, and so is which runs go on and which are compared: a change to either has to be made
here, in plain text, too."""

import pathlib

from shared.config.options import FLAGS

_HERE = pathlib.Path(__file__).parent


def _listed(name: str) -> list[str]:
    return [line for line in (_HERE / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def _line(name: str) -> str:
    flag = FLAGS[name]
    return " | ".join([name, flag.type_name, repr(flag.default), ",".join(flag.choices) or "-"])


def test_flags_types_defaults_and_choices_are_those_of_the_checked_in_list() -> None:
    assert [_line(name) for name in sorted(FLAGS)] == _listed("command_line.txt")


def test_what_must_match_is_what_older_checkpoints_hold_and_older_runs_were_compared_by() -> None:
    lines = [
        " | ".join([name, ",".join(FLAGS[name].must_match), "location" if FLAGS[name].is_location else "-"])
        for name in sorted(FLAGS)
        if FLAGS[name].must_match or FLAGS[name].is_location
    ]
    assert lines == _listed("must_match.txt")
