"""Captions that were encoded beforehand are what the text encoders make of them in a step, in JAX."""

import gc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_trainer import text_encoding
from flax_trainer.base_models import load_base_models
from flax_trainer.compile_report.report import step_shapes
from flax_trainer.compile_report.targets import parse_target
from flax_trainer.profiling.model_flops import model_flops_per_image
from flax_trainer.text_encoding import open_text_encoder
from flax_trainer.training.step import Objective, encode_captions
from shared.config import TrainConfig
from shared.data.batches import BatchLoader, BatchSpec
from shared.run.setup import PreparedRun, prepare, with_precomputed_text

CIRCLES = 5
CAPTIONS = ["", "a prompt"]


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def models_in(*pairs: tuple[str, str]) -> pytest.MarkDecorator:
    """A base model and --mixed_precision each."""
    return pytest.mark.parametrize(("model", "mixed_precision"), pairs, indirect=["model"])


def settings(model: Path, tmp_path: Path, **changes: Any) -> TrainConfig:
    flags: dict[str, Any] = {"resolution": 64, "generated_circles": CIRCLES, "report_to": "none"}
    folders = {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")}
    return TrainConfig(pretrained_model_name_or_path=str(model), **(flags | folders | changes))


def encoded(run: PreparedRun, models: Any, frozen: Any, captions: list[str]) -> Any:
    inputs = run.prompt_inputs(captions)
    return jax.jit(lambda frozen, inputs: encode_captions(models.defs, frozen, inputs))(frozen, inputs), inputs


@models_in(("base_model", "no"), ("base_model", "fp16"), ("xl_model", "no"), ("xl_model", "bf16"))
def test_what_is_stored_is_what_the_encoders_make(model: Path, tmp_path: Path, mixed_precision: str) -> None:
    """On eight devices, each with its share; the run that uses it has no text encoders."""
    plain = settings(model, tmp_path, mixed_precision=mixed_precision)
    config = settings(model, tmp_path, mixed_precision=mixed_precision, precompute_text=True)
    run = prepare(plain, "flax")
    models, initial = load_base_models(plain, run.schedule)
    own_models, own = load_base_models(config, run.schedule)
    assert own.frozen.text_encoder == own.frozen.text_encoder_2 == {}
    assert own.frozen.unet.keys() == initial.frozen.unet.keys()
    ready = with_precomputed_text(prepare(config, "flax"), "flax", lambda: open_text_encoder(config, own_models))
    captions = ["", *(run.source.captions(index)[0] for index in range(CIRCLES))]  # type: ignore[union-attr]
    expected, _ = encoded(run, models, initial.frozen, captions)
    given, stored = encoded(ready, own_models, own.frozen, captions)
    assert not {"input_ids", "input_ids_2"} & stored.keys()
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for ours, live in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == live.dtype
        tolerance = {jnp.float32: 1e-6, jnp.float16: 2e-3, jnp.bfloat16: 1e-2}[live.dtype.type]
        difference = np.linalg.norm(np.float32(ours) - np.float32(live))
        assert difference <= tolerance * np.linalg.norm(np.float32(live))


def test_the_next_start_needs_no_text_encoder(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(base_model, tmp_path, precompute_text=True)
    models, _ = load_base_models(config, prepare(config, "flax").schedule)
    gc.collect()
    before = sum(array.size for array in jax.live_arrays())
    with_precomputed_text(prepare(config, "flax"), "flax", lambda: open_text_encoder(config, models))
    gc.collect()
    assert sum(array.size for array in jax.live_arrays()) <= before, "the text encoders are gone from the devices"
    monkeypatch.setattr(text_encoding, "load_text_encoders", pytest.fail)
    with_precomputed_text(prepare(config, "flax"), "flax", lambda: open_text_encoder(config, models))


@models_in(("base_model", "no"), ("xl_model", "bf16"))
def test_reports_and_flops_are_of_such_a_step(model: Path, tmp_path: Path, mixed_precision: str) -> None:
    """The step that is compiled for a TPU has the batch of a run; what a step computes is what it was."""
    config = settings(
        model, tmp_path, mixed_precision=mixed_precision, precompute_text=True, train_batch_size=2, max_train_steps=1
    )
    plain = settings(model, tmp_path, mixed_precision=mixed_precision)
    run = prepare(config, "flax")
    models, initial = load_base_models(config, run.schedule)
    ready = with_precomputed_text(run, "flax", lambda: open_text_encoder(config, models))

    def blank(run: PreparedRun) -> dict[str, np.ndarray]:
        latents = models.latent_shape(64)
        return BatchLoader(run.source, config, run.prompt_inputs, BatchSpec(2, 4), latents, 1000).blank()

    _, frozen, batch = step_shapes(config, models, parse_target("v4-8"), from_cache=False)
    assert frozen.text_encoder == frozen.text_encoder_2 == {}
    assert frozen.vae
    assert {name: array.shape for name, array in batch.items()} == {
        name: array.shape for name, array in blank(ready).items()
    }
    counts = [
        model_flops_per_image(models.defs, Objective.create(config, models), initial.trained, frozen, batch)
        for frozen, batch in (
            (initial.frozen, blank(ready)),
            (load_base_models(plain, run.schedule)[1].frozen, blank(run)),
        )
    ]
    assert counts[0] == counts[1] > 0
