"""Types of the fields of a `config.json`, with bounds that no published model comes near, and values held against them.

A number beyond them has no other use than to make building the model last for ever.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, get_type_hints

import msgspec

from shared.untrusted import shown
from shared.user_errors import UserError

_MOST_CHANNELS = 2**16  # SDXL's widest layer has 10240
_MOST_RESOLUTIONS = 16  # SDXL has 4, and each halves the image's sides
_MOST_LAYERS = 64  # of one resolution, or of a text encoder: OpenCLIP-bigG has 32
MOST_UNITS = 256  # of a whole model, residual blocks and transformer layers: SDXL's UNet has 75 and builds in a second

Channels = Annotated[int, msgspec.Meta(ge=1, le=_MOST_CHANNELS)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=_MOST_LAYERS)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]  # what a tensor's index can say
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Fraction = Annotated[float, msgspec.Meta(gt=0, le=1)]
Factor = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Name = Annotated[str, msgspec.Meta(max_length=100)]
Widths = Annotated[tuple[Channels, ...], msgspec.Meta(min_length=1, max_length=_MOST_RESOLUTIONS)]
Names = Annotated[tuple[Name, ...], msgspec.Meta(min_length=1, max_length=_MOST_RESOLUTIONS)]
ChannelsPerBlock = Channels | Widths
LayersPerBlock = Layers | Annotated[tuple[Layers, ...], msgspec.Meta(min_length=1, max_length=_MOST_RESOLUTIONS)]
SwitchPerBlock = bool | Annotated[tuple[bool, ...], msgspec.Meta(min_length=1, max_length=_MOST_RESOLUTIONS)]
Size = Positive | Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1, max_length=2)]


def typed_fields(config_class: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a `config.json` that a dataclass has fields for, as the types that it declares; lists are tuples.

    Raises:
        UserError: one is not of its type or beyond its bounds; the message begins with `where` and names the field.
    """
    hints = get_type_hints(config_class, include_extras=True)
    names = [field.name for field in dataclasses.fields(config_class) if field.name in values]
    return {name: _typed(where, name, values[name], hints[name]) for name in names}


def told(value: Any) -> str:
    """The value of a field that nobody knows, for a message: what it may be a text from is not known either.

    A `config.json` may be a link to a file with secrets.
    """
    if value is None or isinstance(value, bool | int | float):
        return shown(repr(value))
    return "(a text)" if isinstance(value, str) else "(a list or object)"


def check_units(where: str, units: int) -> None:
    """Raises UserError for a model of more residual blocks and transformer layers than any has."""
    if units > MOST_UNITS:
        raise UserError(
            f"{where}: layers_per_block and its like come to {units} residual blocks and transformer layers; expected "
            f"at most {MOST_UNITS}, several times as many as Stable Diffusion XL has."
        )


def _typed(where: str, name: str, value: Any, declared: Any) -> Any:
    try:
        return msgspec.convert(value, declared)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {name}={shown(repr(value))} is not supported: {shown(error)}.") from error
