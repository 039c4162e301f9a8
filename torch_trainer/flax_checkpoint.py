"""Reading the Flax backend's Orbax checkpoints without JAX: TensorStore finds each array by its name."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore

_MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}
_LOSS_SCALER = {"scale": "scale", "growth_tracker": "_growth_tracker"}


def is_flax_checkpoint(checkpoint: Path) -> bool:
    """Whether Orbax wrote this checkpoint."""
    return (checkpoint / "state" / "manifest.ocdbt").is_file()


def read_flax_record(checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint says about the run it belongs to.

    Raises:
        ValueError: it is damaged.
    """
    path = checkpoint / "record" / "metadata"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Resume from another checkpoint.") from error


class FlaxCheckpoint(NamedTuple):
    """What is in one, in PyTorch's layouts. `optimizer` is by parameter and torch's name of its state.

    `loss_scaler` has what of a `torch.amp.GradScaler`'s state changes; it is empty for a run that scaled no loss, as is
    `average`, the moving average of the parameters, for one that keeps none.
    """

    step: int
    params: dict[str, np.ndarray]
    optimizer: dict[str, dict[str, np.ndarray]]
    loss_scaler: dict[str, float]
    average: dict[str, np.ndarray]


def read_flax_checkpoint(checkpoint: Path) -> FlaxCheckpoint:
    """Read everything that training goes on from.

    Raises:
        ValueError: it is damaged.
    """
    try:
        arrays = _read_arrays(checkpoint / "state")
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0].partition(" [tensorstore_spec")[0]
        raise ValueError(f"{checkpoint} cannot be read ({reason}). Resume from another checkpoint.") from error
    params: dict[str, np.ndarray] = {}
    state: dict[str, dict[str, np.ndarray]] = {}
    loss_scaler: dict[str, float] = {}
    average: dict[str, np.ndarray] = {}
    for path, array in arrays.items():
        tree, _, name = path.partition(".")
        if tree == "params":
            params[name] = _torch_layout(array)
        elif tree == "ema":
            average[name] = _torch_layout(array)
        elif tree in _MOMENTS:
            state.setdefault(name, {})[_MOMENTS[tree]] = _torch_layout(array)
        elif tree == "loss_scaler":
            loss_scaler[_LOSS_SCALER[name]] = array.item()
    return FlaxCheckpoint(int(arrays["step"]), params, state, loss_scaler, average)


def _read_arrays(folder: Path) -> dict[str, np.ndarray]:
    store = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/"}
    keys = tensorstore.KvStore.open(store).result().list().result()
    names = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
    reads = [
        tensorstore.open({"driver": "zarr", "kvstore": store | {"path": name}}, read=True).result().read()
        for name in names
    ]
    return {name: read.result() for name, read in zip(names, reads, strict=True)}


def _torch_layout(array: np.ndarray) -> np.ndarray:
    """Flax's WHIO and [in, out] → OIHW and [out, in]. (A ControlNet has no other arrays of these ranks.)"""
    return np.ascontiguousarray(array.T if array.ndim in (2, 4) else array)
