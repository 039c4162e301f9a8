"""What is kept of a text: arrays of known names and shapes, in the dtype that is computed with.

Axes: N texts, L tokens, D text features, P pooled features.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.config import TrainConfig
from shared.models.configs import CLIPTextConfig, read_config
from shared.models.source import base_source
from shared.models.stored_dtypes import NUMPY_DTYPES, STORED_DTYPES, StoredDtype


@dataclass(frozen=True)
class Layout:
    """The arrays of one text: `prompt_embeds` [L,D] and, for Stable Diffusion XL, `pooled_prompt_embeds` [P]."""

    stored_dtype: StoredDtype
    shapes: dict[str, tuple[int, ...]]

    @property
    def dtype(self) -> np.dtype[Any]:
        """As numpy has it; uint16 stands for bfloat16."""
        return NUMPY_DTYPES[self.stored_dtype]

    def bytes_of(self, name: str) -> int:
        """Of one array of one text."""
        return math.prod(self.shapes[name]) * self.dtype.itemsize

    @property
    def bytes_per_text(self) -> int:
        return sum(map(self.bytes_of, self.shapes))


def layout_of(config: TrainConfig, length: int, *, is_xl: bool) -> Layout:
    """What a run with this base model and precision keeps.

    Args:
        length: L.

    Raises:
        UserError: a text encoder's configuration is missing or not supported.
    """
    first = read_config(base_source(config, "text_encoder").file(), CLIPTextConfig)
    dtype = STORED_DTYPES[config.mixed_precision or "no"]
    if not is_xl:
        return Layout(dtype, {"prompt_embeds": (length, first.hidden_size)})
    second = read_config(base_source(config, "text_encoder_2").file(), CLIPTextConfig)
    return Layout(
        dtype,
        {
            "prompt_embeds": (length, first.hidden_size + second.hidden_size),
            "pooled_prompt_embeds": (second.projection_dim,),
        },
    )
