"""Captions that were encoded beforehand are what the text encoders make of them in a step, in PyTorch."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.config import TrainConfig
from shared.data.batches import BatchLoader, BatchSpec
from shared.run.setup import PreparedRun, prepare, with_precomputed_text
from torch_trainer import text_encoding
from torch_trainer.base_models import BaseModels, Prompt, TextEncoders, load_base_models, load_text_encoders
from torch_trainer.distributed.accelerator import COMPUTE_DTYPES, make_accelerator
from torch_trainer.profiling.model_flops import ModelShapes
from torch_trainer.text_encoding import open_text_encoder, processes_of_host
from torch_trainer.training.step import encode_captions, to_device

CIRCLES = 5


@pytest.fixture(params=["base_model", "xl_model"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def settings(model: Path, tmp_path: Path, **changes: Any) -> TrainConfig:
    flags: dict[str, Any] = {"resolution": 64, "generated_circles": CIRCLES, "report_to": "none"}
    flags |= {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache"), "mixed_precision": "no"}
    return TrainConfig(pretrained_model_name_or_path=str(model), **(flags | changes))


def precomputed(config: TrainConfig) -> PreparedRun:
    accelerator, run = make_accelerator(config), prepare(config, "torch")
    return with_precomputed_text(
        run,
        "torch",
        lambda: open_text_encoder(config, accelerator, is_xl=run.is_xl),
        processes_of_host(accelerator),
    )


def encoded(run: PreparedRun, models: BaseModels, captions: list[str]) -> Prompt:
    return encode_captions(models, to_device(run.prompt_inputs(captions), torch.device("cpu")))


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_what_is_stored_is_what_the_encoders_make(model: Path, tmp_path: Path, mixed_precision: str) -> None:
    plain = settings(model, tmp_path, mixed_precision=mixed_precision)
    config = settings(model, tmp_path, mixed_precision=mixed_precision, precompute_text=True)
    run, ready, dtype = prepare(plain, "torch"), precomputed(config), COMPUTE_DTYPES[mixed_precision]
    models, own = load_base_models(plain, dtype), load_base_models(config, dtype)
    assert own.text_encoder is own.text_encoder_2 is None
    captions = ["", *(run.source.captions(index)[0] for index in range(CIRCLES))]  # type: ignore[union-attr]
    expected, given = encoded(run, models, captions), encoded(ready, own, captions)
    assert (given.added_cond_kwargs is None) == (expected.added_cond_kwargs is None)
    pairs = [(given.encoder_hidden_states_BLD, expected.encoder_hidden_states_BLD)]
    pairs += [(given.added_cond_kwargs[name], live) for name, live in (expected.added_cond_kwargs or {}).items()]
    for ours, live in pairs:
        assert ours.dtype == live.dtype
        tolerance = 1e-6 if live.dtype == torch.float32 else 1e-2
        assert torch.linalg.norm(ours.float() - live.float()) <= tolerance * torch.linalg.norm(live.float())


def test_the_text_encoders_are_gone_afterwards(xl_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[Any]] = []

    def load(*given: Any, **named: Any) -> TextEncoders:
        text_encoders = load_text_encoders(*given, **named)
        opened.extend(map(weakref.ref, text_encoders))
        return text_encoders

    monkeypatch.setattr(text_encoding, "load_text_encoders", load)
    ready = precomputed(settings(xl_model, tmp_path, precompute_text=True))
    gc.collect()
    assert [reference() for reference in opened] == [None, None]
    assert ready.prompt_inputs([""]).keys() == {"prompt_embeds", "pooled_prompt_embeds", "time_ids"}


def test_the_next_start_needs_no_text_encoder(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(base_model, tmp_path, precompute_text=True)
    precomputed(config)
    monkeypatch.setattr(text_encoding, "load_text_encoders", pytest.fail)
    precomputed(config)


def test_there_is_as_much_to_compute(model: Path, tmp_path: Path) -> None:
    """FLOPs are counted from these shapes."""
    config = settings(model, tmp_path, precompute_text=True)
    plain = settings(model, tmp_path)

    def shapes(config: TrainConfig, run: PreparedRun) -> ModelShapes:
        models = load_base_models(config, torch.float32)
        latents = models.latent_shape(64)
        blank = BatchLoader(run.source, config, run.prompt_inputs, BatchSpec(2), latents, 1000).blank()
        return ModelShapes.of(models, blank, only_mid_control=False)

    stored, live = shapes(config, precomputed(config)), shapes(plain, prepare(plain, "torch"))
    assert (stored.text_shape, stored.added_shapes) == (live.text_shape, live.added_shapes)
    features = np.sum([part.config.hidden_size for part in _text_encoders(plain)])
    assert stored.text_shape == (77, features)


def _text_encoders(config: TrainConfig) -> list[Any]:
    models = load_base_models(config, torch.float32)
    return [model for model in (models.text_encoder, models.text_encoder_2) if model is not None]
