"""One batch through both backends at full size: how far do the loss and the ControlNet's gradients agree?

    python3 -m benchmarks.full_size_parity --folder FOLDER --architecture sd15

FOLDER receives the random model (4.3 GB for sd15, 5.2 GB for sd21, 13.9 GB for sdxl), a random ControlNet whose zero
convolutions are not zero (else all other gradients were), and both backends' gradients. Everything is float32. Each
backend runs in a process of its own; the larger one needs about 19 GB of memory, 40 for sdxl: swap space will do.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from shared.config import TrainConfig
from shared.data.batches import Batch, BatchLoader, BatchSpec
from shared.diffusion.schedule import NoiseSchedule
from shared.run.setup import prepare

ZERO_CONVOLUTION_SPREAD = 0.05
# XLA's default scheduler for CPUs keeps the gradients' temporaries of the whole step at once.
XLA_FLAGS = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--architecture", choices=["tiny", "tiny_xl", "sd15", "sd21", "sdxl"], default="sd15")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--part", choices=["models", "flax", "torch"], help="only this one (used by the script itself)")
    arguments = parser.parse_args()

    folder = arguments.folder / arguments.architecture
    config = TrainConfig(
        pretrained_model_name_or_path=str(folder / "model"),
        controlnet_model_name_or_path=str(folder / "controlnet"),
        generated_circles=8,
        resolution=arguments.resolution,
        train_batch_size=1,
        report_to="none",
        output_dir=str(folder / "run"),
    )
    if arguments.part == "models":
        _write_models(arguments.architecture, folder)
    elif arguments.part is not None:
        _measure(arguments.part, config, folder)
    else:
        for part in ("models", "flax", "torch"):  # each in a process that gives its memory back
            command = [sys.executable, "-m", "benchmarks.full_size_parity", *sys.argv[1:], "--part", part]
            subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": XLA_FLAGS})
        _compare(folder)


def _write_models(architecture: str, folder: Path) -> None:
    if (folder / "controlnet").exists():
        return
    from flax_trainer.models import FlaxControlNetModel, FlaxUNet2DConditionModel
    from flax_trainer.random_model import ARCHITECTURES, write_random_model

    write_random_model(
        ARCHITECTURES[architecture],
        folder / "model",
        prediction_type="v_prediction" if architecture == "sd21" else "epsilon",
    )
    unet = FlaxUNet2DConditionModel.from_pretrained(folder / "model", subfolder="unet")
    FlaxControlNetModel.from_unet(unet).save_pretrained(folder / "controlnet")
    weights = folder / "controlnet" / "diffusion_pytorch_model.safetensors"
    rng = np.random.default_rng(0)
    params = {
        name: value
        if value.any() or value.ndim < 4
        else rng.normal(0, ZERO_CONVOLUTION_SPREAD, value.shape).astype(np.float32)
        for name, value in load_file(weights).items()
    }
    save_file(params, weights)


def _measure(backend: str, config: TrainConfig, folder: Path) -> None:
    started = time.perf_counter()
    loss, grads = _flax(config) if backend == "flax" else _torch(config)
    figures = {
        "loss": loss,
        "seconds": time.perf_counter() - started,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    save_file(grads, folder / f"{backend}.safetensors")
    (folder / f"{backend}.json").write_text(json.dumps(figures), encoding="utf-8")


def _flax(config: TrainConfig) -> tuple[float, dict[str, np.ndarray]]:
    import jax
    import jax.numpy as jnp

    from flax_trainer.base_models import load_base_models
    from flax_trainer.models.params import to_torch_layout
    from flax_trainer.training.step import ComputeParams, Objective, encode_batch, per_sample_losses

    jax.config.update("jax_default_matmul_precision", "highest")
    schedule = NoiseSchedule.from_pretrained(str(config.pretrained_model_name_or_path))
    models, initial = load_base_models(config, schedule)
    objective = Objective(
        schedule,
        np.ones(schedule.num_train_timesteps, np.float32),
        models.configs.vae.scaling_factor,
        jnp.dtype("float32"),
    )
    batch = _batch(config, models.latent_shape(config.resolution))

    @jax.jit
    def encode(frozen, batch):  # type: ignore[no-untyped-def]
        return encode_batch(models.defs, frozen, batch, objective)

    @jax.jit
    def loss_and_grads(params, unet, latents, prompt, batch):  # type: ignore[no-untyped-def]
        def loss(params):  # type: ignore[no-untyped-def]
            compute_params = ComputeParams.of(params, unet, objective.compute_dtype)
            return per_sample_losses(models.defs, compute_params, latents, prompt, batch, objective).mean()

        return jax.value_and_grad(loss)(params)

    encoded = encode(initial.frozen._replace(unet={}), batch)
    params = [initial.controlnet, initial.frozen.unet]
    del initial  # the encoders are not needed any more, and large
    # One array after the other, so that host and device do not both hold all of them.
    controlnet, unet = ({name: jnp.array(host.pop(name)) for name in list(host)} for host in params)
    loss, grads = loss_and_grads(controlnet, unet, *encoded, batch)
    layouts = models.defs.controlnet.layouts
    return float(loss), {
        name: np.ascontiguousarray(to_torch_layout(np.asarray(grad), layouts[name])) for name, grad in grads.items()
    }


def _torch(config: TrainConfig) -> tuple[float, dict[str, np.ndarray]]:
    import torch

    from torch_trainer.base_models import load_base_models
    from torch_trainer.training.step import Objective, per_sample_losses, to_device

    device = torch.device("cpu")
    models = load_base_models(config, torch.float32)
    schedule = NoiseSchedule.from_pretrained(str(config.pretrained_model_name_or_path))
    batch = to_device(_batch(config, models.latent_shape(config.resolution)), device)
    loss = per_sample_losses(models, batch, Objective.create(schedule, None, device)).mean()
    loss.backward()
    return loss.item(), {name: param.grad.numpy() for name, param in models.controlnet.named_parameters()}


def _batch(config: TrainConfig, latent_shape: tuple[int, int, int]) -> Batch:
    """The first batch of the run, [B, …]."""
    prepared = prepare(config, "torch")
    loader = BatchLoader(
        prepared.source,
        config,
        prepared.prompt_inputs,
        BatchSpec(config.train_batch_size),
        latent_shape,
        prepared.schedule.num_train_timesteps,
    )
    return {name: array[0] for name, array in loader.batch(0).items()}


def _compare(folder: Path) -> None:
    figures = {
        backend: json.loads((folder / f"{backend}.json").read_text(encoding="utf-8")) for backend in ("flax", "torch")
    }
    difference, total, worst = 0.0, 0.0, (0.0, "")
    with (
        safe_open(folder / "flax.safetensors", "numpy") as ours,
        safe_open(folder / "torch.safetensors", "numpy") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        for name in theirs.keys():  # noqa: SIM118 (it is no dict)
            a, b = (file.get_tensor(name).astype(np.float64) for file in (ours, theirs))
            norm = float(np.linalg.norm(b))
            worst = max(worst, (float(np.linalg.norm(a - b)) / norm if norm else 0.0, name))
            difference, total = difference + float(np.square(a - b).sum()), total + norm**2
    losses = {backend: values["loss"] for backend, values in figures.items()}
    print(f"loss                 flax {losses['flax']:.8f}, torch {losses['torch']:.8f}")
    print(f"  relative           {abs(losses['flax'] - losses['torch']) / abs(losses['torch']):.2e}")
    print(f"gradients, relative  {(difference / total) ** 0.5:.2e} (norm {total**0.5:.4f})")
    print(f"  worst tensor       {worst[0]:.2e} {worst[1]}")
    for backend, values in figures.items():
        print(f"{backend:<6} {values['seconds']:7.1f} s with loading and compiling, peak {values['peak_gib']:.1f} GiB")


if __name__ == "__main__":
    main()
