"""Reading a command line: words to assignments of texts, and texts to the values of the flags.

One rule splits the words, so that prompts may hold anything: a word that begins with two dashes is a flag, and the
words up to the next flag are its values.
"""

import dataclasses
import difflib
from collections.abc import Collection, Sequence
from typing import Any

from shared.config.flags import Flag

_EXPECTED = {int: "a whole number", float: "a number", str: "a text"}
_NO = "no_"


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Texts given for a flag. `texts` is None for an explicit null; `origin` names the place for messages."""

    name: str
    texts: tuple[str, ...] | None
    origin: str


def read_arguments(words: Sequence[str], flags: dict[str, Flag]) -> list[Assignment]:
    """Split a command line into assignments, in its order.

    Raises:
        ValueError: for a word before the first flag, or a flag that does not exist; abbreviations and hyphens for
            underscores do not count as existing.
    """
    assignments: list[Assignment] = []
    for word in words:
        if word.startswith("--"):
            name, equals, text = word.removeprefix("--").partition("=")
            _check_is_known(name, flags)
            assignments.append(Assignment(name, (text,) if equals else (), f"--{name}"))
        elif not assignments:
            raise ValueError(f"{word!r} stands before the first flag: flags begin with two dashes, as --output_dir.")
        else:
            last = assignments[-1]
            assignments[-1] = dataclasses.replace(last, texts=(*(last.texts or ()), word))
    return [_negation_resolved(assignment, flags) for assignment in assignments]


def value_of(assignment: Assignment, flag: Flag) -> Any:
    """The value that an assignment gives its flag, of the flag's type; whether it is a good one is not asked here.

    Raises:
        ValueError: where the number of texts, a text, or a null does not suit the flag.
    """
    texts, origin = assignment.texts, assignment.origin
    if texts is None:
        if not flag.is_optional:
            raise ValueError(f"{origin} cannot be null: give it a value of type {flag.type_name}, or leave it out.")
        return None
    if flag.kind is bool:
        return _switch_value(texts, origin)
    if not texts:
        raise ValueError(f"{origin} needs a value, {_EXPECTED[flag.kind]}, but nothing follows it.")
    if flag.is_list:
        return tuple(_item_value(text, flag, origin) for text in texts)
    if len(texts) > 1:
        # The words are not repeated: they may be a secret.
        raise ValueError(
            f"{origin} takes one value, but {len(texts)} words follow it: put a value with spaces in quotes, "
            "and two dashes before a flag."
        )
    return _item_value(texts[0], flag, origin)


def suggestion(name: str, known: Collection[str]) -> str:
    """The known name that `name` probably stands for, or an empty text where none comes close."""
    underscored = name.strip("-").replace("-", "_").lower()
    if underscored in known:
        return underscored
    completions = sorted((candidate for candidate in known if candidate.startswith(underscored)), key=len)
    if underscored and completions:
        return completions[0]
    return next(iter(difflib.get_close_matches(underscored, known, n=1)), "")


def _check_is_known(name: str, flags: dict[str, Flag]) -> None:
    negations = [_NO + flag.name for flag in flags.values() if flag.kind is bool]
    known = [*flags, *negations]
    if name not in known:
        closest = suggestion(name, known)
        hint = f"did you mean --{closest}?" if closest else "--help lists them all."
        raise ValueError(f"unknown flag --{name}; {hint}")


def _negation_resolved(assignment: Assignment, flags: dict[str, Flag]) -> Assignment:
    if assignment.name in flags:
        return assignment
    if assignment.texts:
        raise ValueError(f"{assignment.origin} takes no value, but was given {' '.join(assignment.texts)!r}.")
    return dataclasses.replace(assignment, name=assignment.name.removeprefix(_NO), texts=("false",))


def _switch_value(texts: tuple[str, ...], origin: str) -> bool:
    text = " ".join(texts or ("true",))
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{origin} is either true or false, but was given {text!r}.")
    return text.lower() == "true"


def _item_value(text: str, flag: Flag, origin: str) -> Any:
    if flag.kind is str:
        return text
    try:
        # diffusers' published guide writes --profile_steps==5.
        return flag.kind(text.removeprefix("="))
    except ValueError:
        raise ValueError(f"{origin} must be {_EXPECTED[flag.kind]}, but it is {text!r}.") from None
