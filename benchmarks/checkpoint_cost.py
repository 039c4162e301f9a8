"""What saving a checkpoint costs: for how long the training waits, and when the checkpoint is whole on disk.

    python3 -m benchmarks.checkpoint_cost --backend flax --architecture sd15 --folder runs/checkpoint-cost
        [--part 0.25] [--seconds 300]

The state is that of a ControlNet in float32 with AdamW's moments, in arrays of random numbers (so nothing can be
compressed away), on the CPU. It is saved twice, by the run's own code, and the second time counts: files, digests, the
deletion of the first. Between accelerators and the host's memory, their own connection comes to it.
"""

import argparse
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ControlNetModel, UNet2DConditionModel

from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints as OrbaxCheckpoints
from flax_trainer.distributed.pmap import PmapEngine
from flax_trainer.random_model import ARCHITECTURES
from flax_trainer.training.state import TrainState
from shared.checkpoints.policy import checkpoint_record
from shared.config import TrainConfig
from torch_trainer.checkpoints.safetensors_checkpoints import Checkpoints as TorchCheckpoints
from torch_trainer.distributed.trainable_state import ReplicatedState

RECORD = checkpoint_record(TrainConfig(pretrained_model_name_or_path="random"), {"location": None, "samples": 8}, 8)


class Cost(NamedTuple):
    """Seconds of the second of two saves: `held` until the training goes on, `whole` until all is on disk.

    `computing` is how much of `held` its thread had a processor: the rest it waited for the disk, or for others.
    """

    held: float
    computing: float
    whole: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["flax", "torch"], required=True)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sd15")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder, on the disk that is measured")
    parser.add_argument("--part", type=float, default=1.0, help="save only so much of the parameters")
    parser.add_argument("--seconds", type=float, default=300, help="of training between two checkpoints")
    arguments = parser.parse_args()
    controlnet = controlnet_without_weights(arguments.architecture)
    shapes = part_of({name: tuple(param.shape) for name, param in controlnet.named_parameters()}, arguments.part)
    arguments.folder.mkdir(parents=True)
    try:
        save = flax_saving if arguments.backend == "flax" else torch_saving
        cost = measure(*save(controlnet, shapes, arguments.folder))
    finally:
        shutil.rmtree(arguments.folder)
    parameters = sum(map(math.prod, shapes.values()))
    print(told(arguments.backend, arguments.architecture, parameters, cost, arguments.seconds))


def told(backend: str, architecture: str, parameters: int, cost: Cost, seconds: float) -> str:
    """In one line; parameters, and two moments of each, are 4 bytes."""
    gigabytes = 12 * parameters / 1e9
    return (
        f"{backend} {architecture}: {parameters / 1e6:.4g} M parameters, {gigabytes:.3g} GB; the training is held for "
        f"{cost.held:.3g} s ({cost.held / seconds:.2%} of {seconds:g} s; {cost.computing:.3g} s computing), whole "
        f"after {cost.whole:.3g} s ({gigabytes / cost.whole:.3g} GB/s)"
    )


def measure(save: Callable[[int], None], wait: Callable[[], None]) -> Cost:
    """The first save makes what is made once."""
    save(1)
    wait()
    began, computed = time.perf_counter(), time.thread_time()
    save(2)
    held, computing = time.perf_counter() - began, time.thread_time() - computed
    wait()
    return Cost(held, computing, time.perf_counter() - began)


def controlnet_without_weights(architecture: str) -> ControlNetModel:
    """Of that base model, as every run makes it."""
    fields = {name: value for name, value in ARCHITECTURES[architecture].unet.items() if not name.startswith("_")}
    with torch.device("meta"):
        return ControlNetModel.from_unet(UNet2DConditionModel(**fields), load_weights_from_unet=False)


def part_of(shapes: dict[str, tuple[int, ...]], part: float) -> dict[str, tuple[int, ...]]:
    """Parameters of all depths and sizes that hold about this part of all numbers."""
    kept: dict[str, tuple[int, ...]] = {}
    due = 0.0
    for name, shape in shapes.items():
        due += part * math.prod(shape)
        if due >= math.prod(shape) / 2:
            kept[name] = shape
            due -= math.prod(shape)
    return kept


def random_arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


Saving = tuple[Callable[[int], None], Callable[[], None]]


def flax_saving(_: Any, shapes: dict[str, tuple[int, ...]], folder: Path) -> Saving:
    engine = PmapEngine()
    params, mu, nu = (random_arrays(shapes) for _ in range(3))
    state: TrainState = engine.place_state(TrainState.create(params)._replace(mu=mu, nu=nu))
    del params, mu, nu
    checkpoints = OrbaxCheckpoints(folder, keep=1)

    def save(step: int) -> None:
        checkpoints.save(engine.to_save(state)._replace(step=np.array(step, np.int32)), RECORD)

    return save, checkpoints.wait


def torch_saving(controlnet: ControlNetModel, shapes: dict[str, tuple[int, ...]], folder: Path) -> Saving:
    params = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in random_arrays(shapes).items()}
    optimizer = torch.optim.AdamW(params.values())
    for kind in ("exp_avg", "exp_avg_sq"):
        for name, moment in random_arrays(shapes).items():
            optimizer.state[params[name]][kind] = torch.from_numpy(moment)
    state = ReplicatedState(params, SimpleNamespace(optimizer=optimizer), None)
    checkpoints = TorchCheckpoints(Accelerator(cpu=True), controlnet, state, folder, 1)
    return lambda step: checkpoints.save(step, RECORD), checkpoints.wait


if __name__ == "__main__":
    main()
