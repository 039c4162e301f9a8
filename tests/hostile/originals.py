"""The honest files of which models and checkpoints are mutated copies: `python3 -m tests.hostile.originals FOLDER`.

FOLDER/model                          a tiny Stable Diffusion with random weights
FOLDER/{xl_model,xl_controlnet}       a tiny Stable Diffusion XL, and a ControlNet for it
FOLDER/{depth,segmentation,captions}  tiny models of transformers, for `prepare_data annotate` and `caption`
FOLDER/{flax,torch}_run/checkpoint-2  what a run of `checkpoint_words` would have saved, in the files of either backend
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from flax_trainer.base_models import BaseModels, load_base_models
from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints
from flax_trainer.models import FlaxControlNetModel, FlaxUNet2DConditionModel
from flax_trainer.models.params import to_torch_layout
from flax_trainer.random_model import ARCHITECTURES, write_random_model
from flax_trainer.training.state import TrainState
from shared.checkpoints.digests import write_digests
from shared.checkpoints.portable import AVERAGE_FILE, CONTROLNET_FOLDER, OPTIMIZER_FILE, STATE_FILE
from shared.config import parse_command_line
from shared.run.setup import plan_steps, prepare
from tests.hostile.words import CHECKPOINT, STEP, checkpoint_words
from tests.torch_trainer.prepare_data.tiny_models import write_captioner, write_depth_model, write_segmentation_model

_MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu"}


def main(folder: Path) -> None:
    write_random_model(ARCHITECTURES["tiny"], folder / "model")
    write_random_model(ARCHITECTURES["tiny_xl"], folder / "xl_model")
    write_depth_model(folder / "depth")
    write_segmentation_model(folder / "segmentation")
    (write_captioner(folder / "captions") / "vocab.txt").unlink()  # in tokenizer.json too
    unet = FlaxUNet2DConditionModel.from_config(ARCHITECTURES["tiny_xl"].unet)
    FlaxControlNetModel.from_unet(unet).save_pretrained(folder / "xl_controlnet")
    config = parse_command_line(checkpoint_words(folder, folder / "flax_run"), "flax")
    config = dataclasses.replace(config, mixed_precision="no")
    prepared = prepare(config, "flax")
    models, initial = load_base_models(config, prepared.schedule)
    state = _moved(TrainState.create(initial.trained, averages=True))
    record = plan_steps(prepared, devices=1).record
    checkpoints = Checkpoints(folder / "flax_run", keep=None)
    checkpoints.save(state, record)
    checkpoints.close()
    _write_portable(folder / "torch_run" / CHECKPOINT, models, state, record)


def _moved(state: TrainState) -> TrainState:
    """After some steps."""
    moments = {name: np.full_like(value, 1e-3) for name, value in state.params.items()}
    return state._replace(step=np.array(STEP, np.int32), mu=moments, nu=moments)


def _write_portable(folder: Path, models: BaseModels, state: TrainState, record: dict[str, Any]) -> None:
    """As `shared.checkpoints.portable` says."""
    layouts = models.defs.controlnet.layouts

    def in_torch(arrays: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
        return {
            prefix + name: np.ascontiguousarray(to_torch_layout(value, layouts[name])) for name, value in arrays.items()
        }

    FlaxControlNetModel.save_params(folder / CONTROLNET_FOLDER, models.configs.controlnet, state.params, layouts)
    moments = [in_torch(getattr(state, tree), f"{kind}.") for kind, tree in _MOMENTS.items()]
    save_file(moments[0] | moments[1], folder / OPTIMIZER_FILE, metadata={"format": "pt"})
    save_file(in_torch(state.ema), folder / AVERAGE_FILE, metadata={"format": "pt"})
    (folder / STATE_FILE).write_text(json.dumps({"step": STEP, "loss_scaler": None, "record": record}, indent=2) + "\n")
    write_digests(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
