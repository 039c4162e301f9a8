"""Stable Diffusion XL's VAE, whose activations overflow float16, gives pictures and latents in either backend."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from flax_trainer.base_models import load_base_models as load_flax_models
from flax_trainer.evaluation.sampling import decode_latents
from flax_trainer.training.step import Objective, encode_batch
from shared.models.source import CONFIG_FILE
from tests.torch_trainer.tiny_training import batch_of, configuration, schedule_of, slice_of
from torch_trainer.base_models import load_base_models
from torch_trainer.training.step import encode_batch as encode_in_torch
from torch_trainer.training.step import to_device

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def overflowing(xl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With first layers whose weights float16 holds and whose outputs it does not; normalisation takes it back."""
    folder = tmp_path_factory.mktemp("overflowing") / "model"
    shutil.copytree(xl_model, folder)
    weights = load_file(folder / "vae" / WEIGHTS)
    for name in ("encoder.conv_in", "decoder.conv_in"):
        weights |= {f"{name}.{key}": weights[f"{name}.{key}"] * np.float32(2e5) for key in ("weight", "bias")}
    save_file(weights, folder / "vae" / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def said_to_be_mended(overflowing: Path) -> Path:
    """The same VAE by itself, which claims what the fp16-fix does."""
    folder = overflowing.parent / "vae"
    shutil.copytree(overflowing / "vae", folder)
    config = (folder / CONFIG_FILE).read_text()
    assert '"force_upcast": true' in config
    (folder / CONFIG_FILE).write_text(config.replace('"force_upcast": true', '"force_upcast": false'))
    return folder


def in_torch(folder: Path, precision: str, vae: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Latents and pictures."""
    flags = {} if vae is None else {"pretrained_vae_model_name_or_path": str(vae)}
    models = load_base_models(configuration(folder, **flags), PRECISIONS[precision])
    assert {param.dtype for param in models.unet.parameters()} == {PRECISIONS[precision]}
    latents, _ = encode_in_torch(models, to_device(slice_of(batch_of(1, xl=True), 0), torch.device("cpu")))
    with torch.no_grad():
        pictures = models.vae.decode(models.as_vae_input(torch.ones((1, 4, 8, 8)))).sample
    return latents.numpy(), pictures.float().numpy()


def in_flax(folder: Path, precision: str, vae: Path | None) -> tuple[np.ndarray, np.ndarray]:
    flags = {} if vae is None else {"pretrained_vae_model_name_or_path": str(vae)}
    config = configuration(folder, mixed_precision=precision, **flags)
    models, initial = load_flax_models(config, schedule_of(folder))
    assert next(iter(initial.frozen.unet.values())).dtype.name == str(PRECISIONS[precision]).removeprefix("torch.")
    objective, rows = Objective.create(config, models), slice_of(batch_of(1, xl=True), 0)
    latents, _ = jax.jit(lambda frozen, rows: encode_batch(models.defs, frozen, rows, objective))(initial.frozen, rows)
    pictures = decode_latents(models.defs, jax.tree.map(jnp.asarray, initial.frozen.vae), jnp.ones((1, 8, 8, 4)), 1.0)
    return np.asarray(latents), np.asarray(pictures)


@pytest.mark.parametrize("in_backend", [in_flax, in_torch])
def test_it_computes_in_float32_unless_it_is_mended(
    overflowing: Path, said_to_be_mended: Path, in_backend: Callable[..., tuple[np.ndarray, np.ndarray]]
) -> None:
    for precision in PRECISIONS:
        assert all(np.isfinite(array).all() for array in in_backend(overflowing, precision, None)), precision
    assert not any(np.isfinite(array).all() for array in in_backend(overflowing, "fp16", said_to_be_mended))
