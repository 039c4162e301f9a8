"""Text encoders that work once, before the training (`--precompute_text`).

Axes: B texts at once, L tokens.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_trainer.base_models import BaseModels, FrozenParams, load_text_encoders
from flax_trainer.training.step import encode_tokens
from shared.config import TrainConfig
from shared.data.tokenization import TokenIds
from shared.precomputed_text.precomputing import TextEncoder

_ROWS_PER_DEVICE = 32


def open_text_encoder(config: TrainConfig, models: BaseModels) -> TextEncoder:
    """The base model's, on all devices of this process, each with its share of the texts. Freed with what is returned.

    Raises:
        UserError: one is missing or not supported.
    """
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), ("texts",))
    whole, shared_out = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("texts",)))
    frozen = FrozenParams({}, {}, *load_text_encoders(config, is_xl=models.configs.text_encoder_2 is not None))
    placed = jax.device_put(frozen, whole)
    encode = jax.jit(partial(encode_tokens, models.defs))

    def encode_on_devices(token_ids: TokenIds) -> dict[str, npt.NDArray[Any]]:
        encoded = encode(placed, jax.device_put(dict(token_ids), shared_out))
        return {name: as_stored(np.asarray(array)) for name, array in encoded.items()}

    return TextEncoder(_ROWS_PER_DEVICE * len(devices), encode_on_devices)


def as_stored(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """bfloat16 as the bits that it is, which numpy knows by itself."""
    return array.view(np.uint16) if array.dtype == jax.numpy.bfloat16 else array
