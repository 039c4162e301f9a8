"""One way from a file to a configuration, for every model and both backends."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

from shared.untrusted import MIB, read_json, shown
from shared.user_errors import UserError

_LARGEST = MIB  # published ones have some thousand bytes


class Architecture(Protocol):
    """A frozen dataclass that stands for the architecture's fields of a `config.json`."""

    diffusers_class: ClassVar[str | None]
    """What `_class_name` is in its files; None for transformers' models, which have none."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the fields of a `config.json`. UserError for a field whose value is not supported."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, without `_class_name` and the like."""
        ...

    @classmethod
    def published_name(cls, name: str) -> str | None:
        """This project's name for a parameter found in a file; None for one to be ignored."""
        ...


AnyArchitecture = TypeVar("AnyArchitecture", bound=Architecture)


def read_config(path: Path, config_class: type[AnyArchitecture]) -> AnyArchitecture:
    """The configuration in a model's `config.json`.

    Raises:
        UserError: it cannot be read, is that of another kind of model, or asks for something that is not supported.
    """
    values: dict[str, Any] = read_json(path, fix="Download or copy the folder again.", limit=_LARGEST)
    expected = config_class.diffusers_class
    given = values.get("_class_name", expected)
    # Files of diffusers' former Flax classes differ in the name's prefix alone.
    if expected is not None and (not isinstance(given, str) or given.removeprefix("Flax") != expected):
        raise UserError(
            f"{shown(path)} is that of {shown(given)}: expected {expected}. Check the path and the subfolder."
        )
    try:
        return config_class.from_dict(values)
    except ValueError as error:
        raise UserError(f"{shown(path)} describes a model that cannot be used. {error}") from error
