"""The script that makes the demo's base model: each part against something else, and the whole at a tiny size."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from shared.data.sources.circles import draw
from shared.data.sources.colour_names import READABLE_NAMES
from torch_trainer.make_demo_model.__main__ import main
from torch_trainer.make_demo_model.autoencoder import train_autoencoder
from torch_trainer.make_demo_model.circles import draw_circles, normalise
from torch_trainer.make_demo_model.text_to_image import Examples
from torch_trainer.make_demo_model.tokenizer import caption_words, write_word_tokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_word_tokenizer(folder, caption_words())
    return CLIPTokenizer.from_pretrained(folder)


def test_every_word_of_every_caption_is_one_token(tokenizer: CLIPTokenizer) -> None:
    for name in READABLE_NAMES:
        caption = f"{name} circle with {name} background"
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2
        assert tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True).strip() == caption


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet=st.characters(codec="ascii", categories=["Ll", "Nd"]), min_size=1, max_size=30))
def test_unknown_words_survive_in_pieces(tokenizer: CLIPTokenizer, word: str) -> None:
    decoded = tokenizer.decode(tokenizer(word).input_ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == word


def test_words_become_single_tokens_whatever_they_share(tmp_path: Path) -> None:
    words = {"a", "aa", "aaa", "aaaa", "banana", "ananas", "nan"}
    write_word_tokenizer(tmp_path, words)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert all(len(tokenizer(word).input_ids) == 3 for word in words)


def test_circles_are_those_of_the_data_source() -> None:
    circles = draw_circles(3, seed=5)
    for index, truth in enumerate(circles.truths):
        drawn = draw(index, 64, 5)
        assert truth == drawn.truth
        np.testing.assert_array_equal(circles.pixels_NCHW[index].permute(1, 2, 0).numpy(), np.asarray(drawn.image))
    assert normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_latents_are_scaled_to_unit_deviation() -> None:
    pixels_NCHW = draw_circles(32, seed=1).pixels_NCHW
    vae = train_autoencoder(pixels_NCHW, steps=2, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        latents = vae.encode(normalise(pixels_NCHW)).latent_dist.sample() * vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1.0, abs=0.02)


def test_one_caption_in_ten_is_dropped_and_latents_follow_their_distribution() -> None:
    examples = Examples(
        means_NCHW=torch.full((1, 4, 8, 8), 3.0),
        stds_NCHW=torch.full((1, 4, 8, 8), 0.5),
        input_ids_NL=torch.ones((1, 77), dtype=torch.int64),
        empty_ids_L=torch.zeros(77, dtype=torch.int64),
    )
    torch.manual_seed(0)
    latents_BCHW, input_ids_BL = examples.draw_batch(4000)
    assert (input_ids_BL == input_ids_BL[:, :1]).all()
    assert 1 - input_ids_BL[:, 0].float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert latents_BCHW.mean().item() == pytest.approx(3.0, abs=0.01)
    assert latents_BCHW.std().item() == pytest.approx(0.5, abs=0.01)


def test_the_same_seed_trains_the_same_autoencoder() -> None:
    pixels_NCHW = draw_circles(16, seed=1).pixels_NCHW
    one, other, another = (train_autoencoder(pixels_NCHW, steps=2, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], another[name]) for name in one)


def test_the_script_writes_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--circles", "40", "--test_circles", "2", "--seed", "3"]
    steps = ["--vae_steps", "2", "--text_steps", "2", "--unet_steps", "2"]
    monkeypatch.setattr(sys, "argv", ["make_demo_model", "--output_dir", str(tmp_path), *sizes, *steps])
    main()
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("red circle with blue background", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert "--seed 3" in (tmp_path / "README.md").read_text()
