"""What a cache of encoded data says of itself, in its `cache.json`, and whether a run may use it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from shared.config import TrainConfig
from shared.data.cached_latents import LatentsLayout
from shared.data.decoded_pairs import conditioning_interpolation
from shared.data.sources.base import Manifest
from shared.models.digests import digests_of_model
from shared.models.source import vae_source
from shared.models.stored_dtypes import StoredDtype
from shared.models.weight_files import DIFFUSERS
from shared.outgoing.atomic_files import write_text_atomically
from shared.untrusted import MIB, read_json, shown
from shared.user_errors import UserError

RECORD_FILE = "cache.json"

_FORMAT = 1
_LARGEST = 64 * MIB  # the manifest names all shards of the data
_Channels = Annotated[int, Meta(ge=1, le=64)]
_Side = Annotated[int, Meta(ge=1, le=2**16)]


@dataclass(frozen=True)
class CacheRecord:
    """What decides the content of a cache, and how much of it there is.

    Attributes:
        format: of the files; what is written by another version of this project may have another.
        resolution, interpolation, conditioning_interpolation, conditioning_channels: the flags that made the pixels,
            the second being `--image_interpolation_mode`; the last a number where there is one condition, and one for
            each of several.
        latent_shape: (H, W, C) of every sample's latents.
        stored_dtype: of the latents.
        vae: digests of the files of the VAE that made them.
        data: the manifest of what was encoded.
        samples: in the cache; None until it is finished.
    """

    format: int
    resolution: _Side
    interpolation: str
    conditioning_interpolation: str
    conditioning_channels: _Channels | tuple[_Channels, ...]
    latent_shape: tuple[_Side, _Side, _Side]
    stored_dtype: StoredDtype
    vae: dict[str, str]
    data: dict[str, Any]
    samples: Annotated[int, Meta(ge=1, le=2**40)] | None = None

    @property
    def channels_of_conditions(self) -> tuple[int, ...]:
        """Of each condition image of a sample."""
        channels = self.conditioning_channels
        return channels if isinstance(channels, tuple) else (channels,)

    @property
    def layout(self) -> LatentsLayout:
        return LatentsLayout(self.latent_shape, self.stored_dtype)

    def finished(self, samples: int) -> "CacheRecord":
        return dataclasses.replace(self, samples=samples)

    def write(self, folder: Path) -> None:
        """Raises OSError where it cannot be written."""
        write_text_atomically(folder / RECORD_FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def new_record(
    config: TrainConfig, data: Manifest, latent_shape: tuple[int, int, int], stored_dtype: StoredDtype
) -> CacheRecord:
    """Of a cache that is to be made.

    Raises:
        UserError: the VAE cannot be read.
    """
    channels = config.channels_of_conditions
    return CacheRecord(
        format=_FORMAT,
        resolution=config.resolution,
        interpolation=config.image_interpolation_mode,
        conditioning_interpolation=conditioning_interpolation(config),
        conditioning_channels=channels[0] if len(channels) == 1 else channels,
        latent_shape=latent_shape,
        stored_dtype=stored_dtype,
        vae=digests_of_model(vae_source(config), DIFFUSERS),
        data=json.loads(json.dumps(data)),
    )


def read_record(folder: Path) -> CacheRecord:
    """Raises UserError where the folder holds no cache, or one of another version."""
    path = folder / RECORD_FILE
    if not path.is_file():
        raise UserError(
            f"--cached_data {shown(folder)} has no {RECORD_FILE}: expected a folder that "
            "`python3 -m shared.prepare_data cache` made."
        )
    record: CacheRecord = read_json(path, CacheRecord, fix="Make the cache anew.", limit=_LARGEST)
    if record.format != _FORMAT:
        raise UserError(
            f"{shown(path)} is of format {record.format}: this version reads {_FORMAT}. Make the cache anew."
        )
    return record


def record_for(config: TrainConfig, folder: Path) -> CacheRecord:
    """That of a run's `--cached_data`.

    Raises:
        UserError: it is not finished, or was made with another VAE or for another size.
    """
    record = read_record(folder)
    if record.samples is None:
        raise UserError(
            f"--cached_data {shown(folder)} is not finished: run the command that makes it once more, which goes on "
            "where it was stopped."
        )
    made_with = {
        "resolution": (record.resolution, config.resolution),
        "image_interpolation_mode": (record.interpolation, config.image_interpolation_mode),
        "conditioning_interpolation": (record.conditioning_interpolation, conditioning_interpolation(config)),
        "conditioning_channels": (
            " ".join(map(str, record.channels_of_conditions)),
            " ".join(map(str, config.channels_of_conditions)),
        ),
    }
    for flag, (of_cache, of_run) in made_with.items():
        if of_cache != of_run:
            raise UserError(
                f"--cached_data {shown(folder)} was made with --{flag} {shown(of_cache)}, and this run has {of_run}: "
                f"give --{flag} {shown(of_cache)}, or make another cache."
            )
    if digests_of_model(vae_source(config), DIFFUSERS) != record.vae:
        raise UserError(
            f"--cached_data {shown(folder)} was encoded by another VAE than this run's, {vae_source(config).name}. "
            "Give the base model (or --pretrained_vae_model_name_or_path) that it was made with, or make another cache."
        )
    return record
