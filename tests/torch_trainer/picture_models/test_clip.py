"""CLIP score of a small CLIP of noise, against its parts put together by hand."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from shared.evaluate.metrics.base import Measured
from shared.evaluate.metrics.clip_score import ClipScore
from shared.evaluate.options import EvaluateConfig
from tests.torch_trainer.tiny_training import ROOT

CAPTIONS = ["red circle with blue background", "a woman", "green " * 100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "shared" / "demo_model" / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def measured() -> list[Measured]:
    """Two pictures for each caption."""
    photograph = skimage.data.astronaut()
    pictures = [photograph[place : place + 96, 80 * place // 60 : 80 * place // 60 + 64] for place in range(0, 360, 60)]
    return [
        Measured(pictures[0], pictures[0], caption, pictures[2 * place : 2 * place + 2])
        for place, caption in enumerate(CAPTIONS)
    ]


@pytest.mark.parametrize("at_once", [2, 16])
def test_scores_are_cosines_of_both_encoders(folder: Path, at_once: int) -> None:
    config = EvaluateConfig(clip_model_name_or_path=str(folder), metrics_batch_size=at_once)
    found = ClipScore(config).measure(measured())
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer, images = CLIPTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)

    @torch.no_grad()
    def score(picture: np.ndarray, caption: str) -> float:
        tokens = tokenizer(caption, truncation=True, max_length=77, return_tensors="pt")
        of_text = model.text_projection(model.text_model(**tokens).pooler_output)
        pixels = images(picture, return_tensors="pt")["pixel_values"]
        of_image = model.visual_projection(model.vision_model(pixels).pooler_output)
        return float(100 * torch.nn.functional.normalize(of_text) @ torch.nn.functional.normalize(of_image).T)

    expected = [[score(picture, one.caption) for picture in one.pictures_HWC] for one in measured()]
    np.testing.assert_allclose(found.of_conditions["clip_score"], np.mean(expected, axis=1), atol=1e-4)
    figure = found.figures["clip_score"]
    assert figure.value == pytest.approx(np.mean(expected), abs=1e-4)
    assert (figure.conditions, figure.pictures) == (3, 6)
    assert np.ptp(expected) > 1, "scores tell pictures apart"


def test_a_pickle_is_refused_before_anything_is_drawn(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a PyTorch pickle: expected safetensors"):
        ClipScore(EvaluateConfig(clip_model_name_or_path=str(tmp_path)))
