"""The number formats that encoded images and captions are kept in."""

from typing import Any, Literal

import numpy as np

StoredDtype = Literal["F32", "F16", "BF16"]
"""By safetensors' names."""

STORED_DTYPES: dict[str, StoredDtype] = {"no": "F32", "fp16": "F16", "bf16": "BF16"}
"""By `--mixed_precision`."""

# numpy has no bfloat16: its 16 bits travel as they are.
NUMPY_DTYPES: dict[StoredDtype, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
