"""Distances of ControlNets, against numpy on whole arrays."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shared.compare.comparison import compare
from shared.compare.drift import block_of, common_checkpoints, measure_drift
from tests.shared.compare.run_folders import WEIGHTS, Weights, make_run, scaled

FILE = "diffusion_pytorch_model.safetensors"


def write(folder: Path, weights: Weights, name: str = FILE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / name)
    return folder


def other_weights() -> Weights:
    generator = np.random.default_rng(0)
    return {
        name: value + generator.normal(scale=1e-2, size=value.shape).astype(np.float32)
        for name, value in WEIGHTS.items()
    }


def by_hand(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    whole_a, whole_b = (np.concatenate([value.ravel() for value in side]).astype(np.float64) for side in (a, b))
    return float(np.linalg.norm(whole_a - whole_b) / max(np.linalg.norm(whole_a), np.linalg.norm(whole_b)))


def test_overall_by_block_and_by_tensor(tmp_path: Path) -> None:
    a, b = WEIGHTS, other_weights()
    drift = measure_drift(write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert drift.relative == pytest.approx(by_hand(list(a.values()), list(b.values())), rel=1e-12)
    assert drift.size == sum(value.size for value in a.values())
    assert [block.name for block in drift.blocks()] == [
        "conv_in",
        "down_blocks.0",
        "down_blocks.1",
        "controlnet_mid_block",
    ]
    for block in drift.blocks():
        names = [name for name in a if name.startswith(block.name)]
        expected = by_hand([a[name] for name in names], [b[name] for name in names])
        assert block.distance.relative == pytest.approx(expected, rel=1e-12)
        assert block.size == sum(a[name].size for name in names)
    relatives = {name: by_hand([a[name]], [b[name]]) for name in a}
    assert [tensor.name for tensor in drift.worst(2)] == sorted(relatives, key=lambda name: -relatives[name])[:2]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("controlnet_cond_embedding.blocks.0.bias", "controlnet_cond_embedding"),
        ("down_blocks.2.attentions.0.norm.bias", "down_blocks.2"),
        ("mid_block.resnets.0.conv1.weight", "mid_block"),
        ("controlnet_down_blocks.3.weight", "controlnet_down_blocks"),
        ("controlnet_mid_block.bias", "controlnet_mid_block"),
        ("unet.up_blocks.1.resnets.0.norm1.weight", "unet.up_blocks.1"),
        ("unet.conv_norm_out.bias", "unet.conv_norm_out"),
    ],
)
def test_blocks_are_those_of_the_network(name: str, block: str) -> None:
    assert block_of(name) == block


def test_a_trained_decoder_counts_and_the_frozen_rest_of_its_unet_does_not(tmp_path: Path) -> None:
    unet = {name: np.full(3, 2.0, np.float32) for name in ("conv_in.bias", "up_blocks.0.bias", "conv_out.bias")}
    for run, decoder in (("a", 2.0), ("b", 3.0)):
        write(tmp_path / run, WEIGHTS)
        write(tmp_path / run / "unet", unet | {"conv_out.bias": np.full(3, decoder, np.float32)})
    drift = measure_drift(tmp_path / "a", tmp_path / "b")
    assert {tensor.name for tensor in drift.tensors} - WEIGHTS.keys() == {"unet.conv_out.bias", "unet.up_blocks.0.bias"}
    (worst,) = drift.worst(5)
    assert (worst.name, worst.distance.relative) == ("unet.conv_out.bias", pytest.approx(1 / 3))
    assert [block.name for block in drift.blocks()][-2:] == ["unet.conv_out", "unet.up_blocks.0"]
    write(tmp_path / "alone", WEIGHTS)
    with pytest.raises(ValueError, match="different architectures"):
        measure_drift(tmp_path / "a", tmp_path / "alone")


def test_equal_models_are_nowhere_apart(tmp_path: Path) -> None:
    weights = WEIGHTS | {"controlnet_mid_block.bias": np.zeros(2, np.float32)}
    drift = measure_drift(write(tmp_path / "a", weights), write(tmp_path / "b", weights))
    assert drift.relative == 0
    assert drift.worst(8) == []


def test_it_does_not_matter_which_is_first(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", WEIGHTS), write(tmp_path / "b", other_weights())
    assert measure_drift(a, b).relative == measure_drift(b, a).relative


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_infinitely_far(tmp_path: Path, value: float) -> None:
    broken = WEIGHTS | {"conv_in.bias": np.array([value, 0], np.float32)}
    for other in (WEIGHTS, broken):
        drift = measure_drift(write(tmp_path / "a", broken), write(tmp_path / "b", other))
        assert drift.relative == np.inf
        assert drift.worst(1)[0].name == "conv_in.bias"


def test_shards_are_one_model(tmp_path: Path) -> None:
    names = sorted(WEIGHTS)
    files = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        write(tmp_path / "b", {name: WEIGHTS[name] for name in names if files[name] == file}, file)
    (tmp_path / "b" / f"{FILE}.index.json").write_text(json.dumps({"weight_map": files}))
    assert measure_drift(write(tmp_path / "a", WEIGHTS), tmp_path / "b").relative == 0
    (tmp_path / "b" / "model-0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is not whole .*model-0.safetensors"):
        measure_drift(tmp_path / "a", tmp_path / "b")


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", WEIGHTS)
    more = write(tmp_path / "more", WEIGHTS | {f"down_blocks.3.{i}": np.zeros(1, np.float32) for i in range(5)})
    with pytest.raises(ValueError, match=r"only the one in .*more has down_blocks.3.0, .* and 2 more"):
        measure_drift(a, more)
    reshaped = write(tmp_path / "reshaped", WEIGHTS | {"conv_in.bias": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"conv_in.bias \[2\] and \[3\]"):
        measure_drift(a, reshaped)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (write(tmp_path / "b", WEIGHTS) / FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="is not whole"):
        measure_drift(write(tmp_path / "a", WEIGHTS), tmp_path / "b")


def test_checkpoints_in_diffusers_layout_are_compared(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for step, factor in ((1, 1.0), (2, 1.5)):
        write(a / f"checkpoint-{step}" / "controlnet", WEIGHTS)
        write(b / f"checkpoint-{step}" / "controlnet", scaled(WEIGHTS, factor))
    write(a / "checkpoint-3" / "controlnet", WEIGHTS)
    (b / "checkpoint-3" / "state").mkdir(parents=True)
    (a / "checkpoint-4").mkdir()
    assert common_checkpoints(a, b) == ([1, 2], [3])
    comparison = compare(a, b)
    assert comparison.checkpoint_drift == pytest.approx({1: 0.0, 2: 0.5 / 1.5})
    assert comparison.unreadable_checkpoints == [3]
