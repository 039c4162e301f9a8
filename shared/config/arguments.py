"""Reading a command line: words to assignments of texts, and texts to the values of the flags.

One rule splits the words, so that prompts may hold anything: a word that begins with two dashes is a flag, and the
words up to the next flag are its values.
"""

import dataclasses
import difflib
import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

from shared.config.flags import Flag
from shared.outgoing.redaction import described, looks_secret
from shared.user_errors import UserError

_EXPECTED = {int: "a whole number", float: "a number", str: "a text"}
_NO = "no_"

# Python's own int and float take digits of every script, and underscores.
_NUMBERS = {
    int: re.compile(r"[+-]?[0-9]+(?:_[0-9]+)*"),
    float: re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf|infinity|nan)", re.IGNORECASE),
}
_LARGEST_INT = 2**63 - 1  # what the arrays of numpy, JAX and PyTorch hold
_LONGEST_NUMBER = 400  # characters: 1.8e308 written out has 309

_LAYOUT = "\n\r\t"  # of prompts
_UNSEEN = re.compile("[\u2028-\u202e\u2066-\u2069]")  # line and paragraph breaks, reversals of the reading direction

_NAME = re.compile(r"[A-Za-z0-9_-]")
_LONGEST_NAME = 40  # characters; the longest flag has 43, but whoever mistypes that comes close to it
_WORD = r"(?:[a-z]{1,14}|[A-Z]{1,14})[0-9]{0,2}|[0-9]{1,2}[a-z]{1,6}"  # a token's letters and digits alternate more
_WORDS = re.compile(rf"-?(?:(?:{_WORD})(?:[_-]|$))*")


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Texts given for a flag. `texts` is None for an explicit null; `origin` names the place for messages."""

    name: str
    texts: tuple[str, ...] | None
    origin: str


def read_arguments(words: Sequence[str], flags: dict[str, Flag]) -> list[Assignment]:
    """Split a command line into assignments, in its order.

    Raises:
        UserError: for a word before the first flag, or a flag that does not exist; abbreviations and hyphens for
            underscores do not count as existing.
    """
    assignments: list[Assignment] = []
    for word in words:
        if word.startswith("--"):
            name, equals, text = word.removeprefix("--").partition("=")
            _check_is_known(name, flags)
            assignments.append(Assignment(name, (text,) if equals else (), f"--{name}"))
        elif not assignments:
            raise UserError(
                f"{described(word)} stands before the first flag: flags begin with two dashes, as --output_dir."
            )
        else:
            last = assignments[-1]
            assignments[-1] = dataclasses.replace(last, texts=(*(last.texts or ()), word))
    return [_negation_resolved(assignment, flags) for assignment in assignments]


def read_values(words: Sequence[str], flags: dict[str, Flag]) -> dict[str, Any]:
    """The values that a command line gives its flags, by name; of a repeated one the last.

    Raises:
        UserError: as `read_arguments` and `value_of`.
    """
    given = read_arguments(words, flags)
    return {assignment.name: value_of(assignment, flags[assignment.name]) for assignment in given}


def value_of(assignment: Assignment, flag: Flag) -> Any:
    """The value that an assignment gives its flag, of the flag's type; whether it is a good one is not asked here.

    Raises:
        UserError: where the number of texts, a text, or a null does not suit the flag.
    """
    texts, origin = assignment.texts, assignment.origin
    if texts is None:
        if not flag.is_optional:
            raise UserError(f"{origin} cannot be null: give it a value of type {flag.type_name}, or leave it out.")
        return None
    if flag.kind is bool:
        return _switch_value(texts, origin)
    if not texts:
        raise UserError(f"{origin} needs a value, {_EXPECTED[flag.kind]}, but nothing follows it.")
    if flag.is_list:
        return tuple(_item_value(text, flag, origin) for text in texts)
    if len(texts) > 1:
        # The words are not repeated: they may be a secret.
        raise UserError(
            f"{origin} takes one value, but {len(texts)} words follow it: put a value with spaces in quotes, "
            "and two dashes before a flag."
        )
    return _item_value(texts[0], flag, origin)


def suggestion(name: str, known: Collection[str]) -> str:
    """The known name that `name` probably stands for, or an empty text where none comes close."""
    underscored = name.strip("-…").replace("-", "_").lower()
    if underscored in known:
        return underscored
    completions = sorted((candidate for candidate in known if candidate.startswith(underscored)), key=len)
    if underscored and completions:
        return completions[0]
    return next(iter(difflib.get_close_matches(underscored, known, n=1)), "")


def told_name(name: str, known: Collection[str]) -> str:
    """As much of an unknown name as surely is a mistyped one, with … for the rest, which may be a token."""
    told = name[: _end_of_name(name)]
    if len(told) < len(name):
        return told_name(told, known).removesuffix("…") + "…"
    place = 0
    for flag in known:
        place = max(place, _length_of_beginning(name, flag))
    if place:
        return name if place == len(name) else f"{name[:place]}…"
    return name if _WORDS.fullmatch(name) and len(name) <= _LONGEST_NAME and not looks_secret(name) else "…"


def _end_of_name(name: str) -> int:
    return next((place for place, letter in enumerate(name) if not _NAME.match(letter)), len(name))


def _length_of_beginning(name: str, flag: str) -> int:
    """How many characters of the name spell the flag, in whatever case and with whatever separators; 0 for none."""
    pattern = "[_-]*".join(map(re.escape, flag.replace("_", "")))
    spelled = re.match(rf"[_-]*{pattern}", name, re.IGNORECASE)
    return spelled.end() if spelled else 0


def _check_is_known(name: str, flags: dict[str, Flag]) -> None:
    negations = [_NO + flag.name for flag in flags.values() if flag.kind is bool]
    known = [*flags, *negations]
    if name not in known:
        told = told_name(name, known)
        closest = suggestion(told, known)
        hint = f"did you mean --{closest}?" if closest else "--help lists them all."
        raise UserError(f"unknown flag --{told}; {hint}")


def _negation_resolved(assignment: Assignment, flags: dict[str, Flag]) -> Assignment:
    if assignment.name in flags:
        return assignment
    if assignment.texts:
        raise UserError(f"{assignment.origin} takes no value, but was given {described(' '.join(assignment.texts))}.")
    return dataclasses.replace(assignment, name=assignment.name.removeprefix(_NO), texts=("false",))


def _switch_value(texts: tuple[str, ...], origin: str) -> bool:
    text = " ".join(texts or ("true",))
    if text.lower() not in ("true", "false"):
        raise UserError(f"{origin} is either true or false, but was given {described(text)}.")
    return text.lower() == "true"


def _item_value(text: str, flag: Flag, origin: str) -> Any:
    if flag.kind is str:
        _check_text(text, flag, origin)
        return text
    # diffusers' published guide writes --profile_steps==5.
    number = text.removeprefix("=").strip(" ")
    if len(number) > _LONGEST_NUMBER or not _NUMBERS[flag.kind].fullmatch(number):
        raise UserError(f"{origin} must be {_EXPECTED[flag.kind]}, but it is {described(text)}.")
    value = flag.kind(number)
    if flag.kind is int and abs(value) > _LARGEST_INT:
        raise UserError(f"{origin} must be a whole number below 2**63, but it is {described(text)}.")
    return value


def _check_text(text: str, flag: Flag, origin: str) -> None:
    """Raises UserError, without quoting the text, for what no honest value holds."""
    for place, letter in enumerate(text, start=1):
        if letter.isprintable() or (flag.is_prompt and letter in _LAYOUT):
            continue
        if unicodedata.category(letter) == "Cs":
            raise UserError(f"{origin} is not UTF-8: {_broken(letter)} stands at character {place}. Write it in UTF-8.")
        if unicodedata.category(letter) == "Cc" or _UNSEEN.match(letter):
            escaped = letter.encode("unicode_escape").decode("ascii")
            raise UserError(f"{origin} holds the control character {escaped} at character {place}: take it out.")


def _broken(surrogate: str) -> str:
    """Python takes the bytes of a command line that are no UTF-8 for the surrogates from U+DC80 on."""
    code = ord(surrogate)
    return f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else "half of a surrogate pair"
