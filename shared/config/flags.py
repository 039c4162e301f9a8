"""What a command-line flag is, and how a field of the configuration declares one: the only place for its facts."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, cast

Backend = Literal["flax", "torch"]
Occasion = Literal["resume", "compare"]

_METADATA_KEY = "flag"
_TYPE_NAMES = {bool: "bool", int: "int", float: "float", str: "str"}

_P = ParamSpec("_P")


class Rule(NamedTuple):
    """What the number that a flag is given must be: "--resolution must be 1 or more"."""

    is_kept_by: Callable[[float], bool]
    words: str


# Comparisons are written so that nan fails them.
FROM_ZERO = Rule(lambda value: 0 <= value < math.inf, "a finite number, 0 or more")
BELOW_ONE = Rule(lambda value: 0 <= value < 1, "at least 0 and less than 1")


def at_least(least: int) -> Rule:
    return Rule(lambda value: value >= least, f"{least} or more")


def at_most(largest: int) -> Rule:
    return Rule(lambda value: value <= largest, f"at most {largest}")


def within(least: int, largest: int) -> Rule:
    return Rule(lambda value: least <= value <= largest, f"in the range from {least} to {largest}")


@dataclasses.dataclass(frozen=True)
class Missing:
    """A backend does not implement the flag: with `value`, only that value; otherwise any but the default."""

    advice: str
    value: Any = None


@dataclasses.dataclass(frozen=True)
class Equivalent:
    """A backend accepts the flag although it does nothing literal about it; `notice` says what is true instead."""

    notice: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What may be declared of a flag beside its type, default and meaning.

    Attributes:
        must_be: what its number has to keep to, unless it is None; the first that it breaks is told.
        must_match: when it has to be what it was: in a run that resumes from a checkpoint, in two runs that are
            compared step by step. (Resuming compares the data themselves, so it does not ask how they were named.)
        names: what its value names; a text is the path of that or its address.
        only_with: the flag without which it means nothing.
        of_one_start: whether every start of every process is told another value, which is no part of what is trained.
        is_prompt: whether it is told to a model: any text, of several lines or none, and never an address.
        secret: whether no file, log, tracker or message may hold it.
        needs_whole_weights: whether PyTorch cannot honour it where DeepSpeed or FSDP divides the weights.
        flax: how the Flax backend honours it, if not literally.
        torch: how the PyTorch backend honours it, if not literally.
    """

    must_be: Sequence[Rule] = ()
    must_match: Sequence[Occasion] = ()
    names: Literal["weights", "tokenizer", "data"] | None = None
    only_with: str | None = None
    of_one_start: bool = False
    is_prompt: bool = False
    secret: bool = False
    needs_whole_weights: bool = False
    flax: Missing | Equivalent | None = None
    torch: Missing | Equivalent | None = None


@dataclasses.dataclass(frozen=True)
class Flag(Facts):
    """One flag of the command line.

    Attributes:
        name: the flag without its dashes, equal to the configuration's attribute.
        kind: bool, int, float or str; of the items where `is_list`.
        is_list: whether the flag takes one or more values, held as a tuple.
        is_optional: whether the value may be None.
        choices: the values allowed, or () where any value of the kind will do.
        default: the value when the flag is not given.
        group: the heading it stands under in the help.
        help: a sentence or more about it, without the default.
    """

    name: str
    kind: type
    is_list: bool
    is_optional: bool
    choices: tuple[str, ...]
    default: Any
    group: str
    help: str

    @property
    def type_name(self) -> str:
        """The type in words, such as `str list | None`."""
        return _TYPE_NAMES[self.kind] + " list" * self.is_list + " | None" * self.is_optional

    @property
    def is_location(self) -> bool:
        """Whether its value is a path or an address, or several: the same files may lie elsewhere."""
        return self.names is not None and self.kind is str

    def in_backend(self, backend: Backend) -> Missing | Equivalent | None:
        """How a backend honours the flag; None for literally."""
        return {"flax": self.flax, "torch": self.torch}[backend]


def _declaring(facts_of: Callable[_P, Facts]) -> Callable[Concatenate[str, Any, str, _P], Any]:
    """The function below, whose last arguments a type checker knows as those of `facts_of`."""

    def flag(group: str, default: Any, help_sentence: str, /, *args: _P.args, **kwargs: _P.kwargs) -> Any:
        facts = facts_of(*args, **kwargs)
        metadata = {_METADATA_KEY: (group, help_sentence, facts)}
        return dataclasses.field(default=default, repr=not facts.secret, metadata=metadata)

    return flag


flag = _declaring(Facts)
"""Declares a dataclass field as a flag: `flag(group, default, help_sentence, **facts)`.

A secret one is left out of the configuration's repr.
"""


def flags_of(config_class: type) -> dict[str, Flag]:
    """The flags that a dataclass declares, by name, in the order of its fields."""
    hints = typing.get_type_hints(config_class)
    return {field.name: _flag_of(field, hints[field.name]) for field in dataclasses.fields(config_class)}


def _flag_of(field: dataclasses.Field[Any], hint: Any) -> Flag:
    is_optional = types.NoneType in typing.get_args(hint)
    if is_optional:
        (hint,) = (member for member in typing.get_args(hint) if member is not types.NoneType)
    is_list = typing.get_origin(hint) is tuple
    if is_list:
        hint = typing.get_args(hint)[0]
    choices = cast(tuple[str, ...], typing.get_args(hint)) if typing.get_origin(hint) is Literal else ()
    group, help_sentence, facts = field.metadata[_METADATA_KEY]
    return Flag(
        name=field.name,
        kind=str if choices else hint,
        is_list=is_list,
        is_optional=is_optional,
        choices=choices,
        default=field.default,
        group=group,
        help=help_sentence,
        **vars(facts),
    )
