"""Inception with weights of noise, against what another implementation makes of them, and the distances from it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

from shared.evaluate.metrics.base import Measured, Pixels
from shared.evaluate.metrics.fid import Fid
from shared.evaluate.options import EvaluateConfig
from shared.evaluation.frechet_distance import frechet_distance
from shared.evaluation.kernel_distance import kernel_distance
from tests.torch_trainer.picture_models.inception_of_noise import state_of_noise
from torch_trainer.picture_models.inception import load_features, resized

# Of FeatureExtractorInceptionV3 of torch-fidelity 0.4.0 with `state_of_noise(0)`: each three-hundredth feature.
OF_TORCH_FIDELITY = [
    [0.06977383, 0.14060588, 0.9806979, 1.5541791, 0.11705074, 0.88691354, 2.3118339],
    [0.0942443, 0.11002769, 1.0485393, 1.8624063, 0.12572458, 1.0461515, 2.889989],
]
MEANS, DEVIATIONS = [0.7067189, 0.87279373], [0.93004173, 1.1518551]
PARAMETERS = 21_785_568  # of Inception v3 without its classifiers


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pytorch-fid's file is: tensors alone, the classifier among them."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state_of_noise() | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


def test_features_are_those_of_torch_fidelity(weights: Path) -> None:
    assert sum(value.numel() for name, value in state_of_noise().items() if "running" not in name) == PARAMETERS
    photograph = skimage.data.astronaut()
    pictures = [photograph[row : row + 299, column : column + 299] for row, column in ((0, 0), (200, 150))]
    found = load_features(weights)(pictures)
    assert found.shape == (2, 2048)
    np.testing.assert_allclose(found[:, ::300], OF_TORCH_FIDELITY, atol=2e-5)
    np.testing.assert_allclose(found.mean(axis=1), MEANS, atol=1e-5)
    np.testing.assert_allclose(found.std(axis=1), DEVIATIONS, atol=1e-5)


def test_pictures_are_resized_without_aliasing() -> None:
    """Stripes of one pixel become grey, and a picture of the size itself stays as it is."""
    stripes = np.zeros((598, 598, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resized(stripes)[5:-5, 5:-5] - 127.5).max() < 3
    photograph = skimage.data.astronaut()[:299, :299]
    np.testing.assert_array_equal(resized(photograph), photograph)


def pairs(drawn: Callable[[int, list[Pixels]], list[Pixels]]) -> list[Measured]:
    photograph = skimage.data.astronaut()
    parts = [photograph[60 * place : 60 * place + 64, 150:214] for place in range(6)]
    return [Measured(part, part, "", drawn(place, parts)) for place, part in enumerate(parts)]


def noise(place: int, parts: list[Pixels]) -> list[Pixels]:
    return [np.random.default_rng(place).integers(0, 256, (64, 64, 3), np.uint8)]


def test_the_held_out_pictures_themselves_are_at_no_distance(weights: Path) -> None:
    """Those of other pairs: which belongs to which plays no part."""
    metric = Fid(EvaluateConfig(inception_weights=str(weights), metrics_batch_size=4))
    same = metric.measure(pairs(lambda place, parts: [parts[(place + 3) % len(parts)]])).figures
    other = metric.measure(pairs(noise)).figures
    assert same["fid"].value < 1e-3 * other["fid"].value
    assert same["kid"].value <= 0 < other["kid"].value
    assert "cannot be compared with any" in other["fid"].note
    assert "6 pairs do not even determine the covariance" in other["fid"].note
    assert other["fid"].standard_error is None


def test_figures_are_of_the_features_of_truths_and_pictures(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures of each pair, in batches that no pair fits into evenly."""

    def features(pictures: Sequence[Pixels]) -> np.ndarray:
        assert len(pictures) <= 5
        return np.stack([picture.mean(axis=(0, 1)) / 255 for picture in pictures])

    monkeypatch.setattr("torch_trainer.picture_models.inception.load_features", lambda path: features)
    every = pairs(lambda place, parts: [*noise(place, parts), 255 - parts[place]])
    metric = Fid(EvaluateConfig(inception_weights=str(weights), metrics_batch_size=5))
    found = metric.measure(every).figures
    truths = np.concatenate([features([one.truth_HWC]) for one in every])
    drawn = np.stack([features(one.pictures_HWC) for one in every])
    assert found["fid"].value == pytest.approx(frechet_distance(truths, drawn.reshape(12, 3)))
    assert (found["kid"].value, found["kid"].standard_error) == pytest.approx(kernel_distance(truths, drawn))
    for figure in found.values():
        assert (figure.conditions, figure.pictures, figure.better) == (6, 12, "lower")


def test_what_holds_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--metrics fid needs --inception_weights.*Run: wget https://github\.com/"):
        Fid(EvaluateConfig())
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "few.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": Path("x")}, tmp_path / "objects.pth")
    for name, message in (
        ("nowhere.pth", r"there is no file .*nowhere\.pth\. Run: wget"),
        ("text.pth", r"text\.pth holds something else than tensors"),
        ("few.pth", r"few\.pth holds no weights of Inception v3"),
        ("list.pth", r"list\.pth holds no weights of Inception v3"),
        ("objects.pth", r"objects\.pth holds something else than tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            Fid(EvaluateConfig(inception_weights=str(tmp_path / name)))
