"""What a command-line flag is, and how a field of the configuration declares one."""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, cast

_METADATA_KEY = "flag"
_TYPE_NAMES = {bool: "bool", int: "int", float: "float", str: "str"}


@dataclasses.dataclass(frozen=True)
class Flag:
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


def flags_in_group(group: str) -> Callable[..., Any]:
    """A function that declares dataclass fields as flags of one help group: `declare(default, help, secret=False)`.

    A secret field is left out of the configuration's repr.
    """

    def declare(default: Any, help_sentence: str, *, secret: bool = False) -> Any:
        metadata = {_METADATA_KEY: (group, help_sentence)}
        return dataclasses.field(default=default, repr=not secret, metadata=metadata)

    return declare


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
    group, help_sentence = field.metadata[_METADATA_KEY]
    return Flag(
        name=field.name,
        kind=str if choices else hint,
        is_list=is_list,
        is_optional=is_optional,
        choices=choices,
        default=field.default,
        group=group,
        help=help_sentence,
    )
