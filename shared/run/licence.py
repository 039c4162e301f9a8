"""Under which licence a ControlNet is published: that of its base model."""

import logging
from typing import NamedTuple

import yaml

from shared.config import TrainConfig
from shared.models.source import base_source, shown_name
from shared.outgoing.redaction import masked
from shared.untrusted import MIB, read_file
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_CARD = "README.md"
_LONGEST = 300  # characters of a line


class Licence(NamedTuple):
    """As the Hub's cards tell it: `license`, and for those that are `other` a name and an address."""

    license: str
    name: str | None = None
    link: str | None = None


STABLE_DIFFUSION = Licence("creativeml-openrail-m")
"""Of 1.x."""
OPENRAIL_PLUS_PLUS = Licence("openrail++")
"""Of 2.x and XL."""


def licence_of(config: TrainConfig, usual: Licence, *, asks_hub: bool) -> Licence:
    """What the base model's own card says; `usual` where it says nothing or cannot be read.

    Args:
        asks_hub: of what is about to be published: a model on the Hub is looked up there, and a licence that is not
            told is said in the log.

    Reference: Hugging Face Hub documentation, "Model Card components", metadata of a card.
    """
    name, source = shown_name(str(config.pretrained_model_name_or_path)), base_source(config, "")
    if not source.is_local and not asks_hub:
        return usual
    try:
        card = source.optional_file(_CARD)
        told = None if card is None else _licence_in(read_file(card, MIB))
    except UserError as error:
        logger.info("The card of %s cannot be read (%s)", name, masked(str(error)))
        told = None
    if told is None and asks_hub:  # others will see it
        logger.info(
            "The card of %s tells no licence: that of the ControlNet is put down as %s, as usual for its kind. Correct "
            "README.md if it is another",
            name,
            usual.license,
        )
    return told or usual


def _licence_in(card: bytes) -> Licence | None:
    """From the YAML between the first two lines of three dashes. A link that is no address would lead anywhere."""
    lines = [line.rstrip() for line in card.decode("utf-8", "replace").splitlines()]
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return None
    metadata = lines[1 : lines.index("---", 1)]
    license_, name, link = (_value(metadata, key) for key in ("license", "license_name", "license_link"))
    is_address = link is not None and link.startswith(("https://", "http://"))
    return None if license_ is None else Licence(license_, name, link if is_address else None)


def _value(metadata: list[str], key: str) -> str | None:
    """A short text that stands in one line with its key: whole documents of others may be made to grow when read."""
    line = next((line for line in metadata if line.startswith(f"{key}:")), "")
    if len(line) > _LONGEST:
        return None
    try:
        value = yaml.safe_load(line.partition(":")[2])
    except (yaml.YAMLError, ValueError):  # ValueError: a date that is none
        return None
    return value if isinstance(value, str) and value.isprintable() else None
