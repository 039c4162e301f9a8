"""Depths and segmentations are those of transformers itself, from models that hold what they say and run nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, SegformerForSemanticSegmentation, pipeline

from shared.data.preprocessing import decode
from shared.data.sources import open_source
from shared.data.sources.base import RandomAccessSource
from shared.prepare_data.annotating import Annotator
from shared.user_errors import UserError
from tests.shared.data.pictures import config, pairs, write_image_folder
from tests.torch_trainer.prepare_data.tiny_models import write_depth_model, write_segmentation_model
from torch_trainer.prepare_data.ade20k import PALETTE_NC
from torch_trainer.prepare_data.command import main
from torch_trainer.prepare_data.depth import open_depth
from torch_trainer.prepare_data.segmentation import open_segmentation

SIZES = ((60, 90), (64, 64), (60, 90), (90, 40))  # (H, W), of which the model sees three shapes


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_depth_model(tmp_path_factory.mktemp("depth") / "model")


@pytest.fixture(scope="module")
def segmentation_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_segmentation_model(tmp_path_factory.mktemp("segmentation") / "model")


def images() -> list[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


def made(annotator: Annotator) -> list[npt.NDArray[np.uint8]]:
    return list(annotator.annotate([annotator.prepare(image_HWC) for image_HWC in images()]))


def test_depths_are_the_pipelines(depth_model: Path) -> None:
    estimate = pipeline("depth-estimation", model=str(depth_model), device="cpu")
    for image_HWC, depth_HW in zip(images(), made(open_depth(str(depth_model))), strict=True):
        expected_HW = np.asarray(estimate(PIL.Image.fromarray(image_HWC))["depth"])
        assert depth_HW.shape == expected_HW.shape == image_HWC.shape[:2]
        assert np.abs(depth_HW.astype(int) - expected_HW).max() <= 1, "a sum in another order, just at a step"
        assert depth_HW.min() == 0
        assert depth_HW.max() == 255


def test_classes_are_the_models_in_ade20ks_colours(segmentation_model: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(segmentation_model)
    model = SegformerForSemanticSegmentation.from_pretrained(segmentation_model).eval()
    colours = set[tuple[int, ...]]()
    for image_HWC, map_HWC in zip(images(), made(open_segmentation(str(segmentation_model))), strict=True):
        with torch.no_grad():
            logits_BNhw = model(**processor(PIL.Image.fromarray(image_HWC), return_tensors="pt")).logits
        logits_BNHW = torch.nn.functional.interpolate(logits_BNhw, image_HWC.shape[:2], mode="bilinear")
        expected_HWC = PALETTE_NC[logits_BNHW[0].argmax(0).numpy()]
        assert map_HWC.dtype == np.uint8
        assert (map_HWC == expected_HWC).all(axis=-1).mean() > 0.999
        colours |= {tuple(map(int, colour)) for colour in map_HWC.reshape(-1, 3)}
    assert len(colours) > 5
    # What people look up: https://github.com/CSAILVision/sceneparsing, visualizationCode/color150
    assert PALETTE_NC[[0, 2, 12, 149]].tolist() == [[120, 120, 120], [6, 230, 230], [150, 5, 61], [92, 0, 255]]
    assert len(np.unique(PALETTE_NC, axis=0)) == 149, "signboards have the grey of roads, and all others their own"


def annotate(output: Path, *words: object) -> int:
    return main(["annotate", "--output_dir", str(output), "--num_workers", "2", *map(str, words)])


def test_shards_hold_what_the_annotator_makes_and_are_the_same_again(tmp_path: Path, depth_model: Path) -> None:
    data = write_image_folder(tmp_path / "data", pairs(9))
    (data / "image" / "0004.png").write_bytes(b"no picture")
    words = ("--train_data_dir", data, "--condition", "depth", "--annotator_model", depth_model, "--batch_size", 3)
    words = (*words, "--samples_per_shard", 4)
    assert annotate(tmp_path / "shards", *words) == 0
    source = open_source(config(train_shards=(f"{tmp_path}/shards/*.tar",)))
    assert isinstance(source, RandomAccessSource)
    assert [source.captions(number)[0] for number in range(len(source))] == [
        f"caption {number}" for number in range(9) if number != 4
    ]
    annotator = open_depth(str(depth_model))
    for number in range(len(source)):
        sample = source[number]
        assert sample.image is not None
        (condition,) = sample.conditions
        (alone_HW,) = annotator.annotate([annotator.prepare(np.asarray(decode(sample.image)))])
        condition_HWC = np.asarray(decode(condition)).astype(int)
        assert np.abs(condition_HWC - alone_HW[..., None]).max() <= 1
    card = json.loads((tmp_path / "shards" / "packed.json").read_text())
    assert card["settings"]["annotator_model"] == str(depth_model)
    assert len(card["left_out"]) == 1

    assert annotate(tmp_path / "again", *words) == 0
    for shard in (tmp_path / "shards").glob("*.tar"):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()


def other_labels(folder: Path) -> None:
    write_segmentation_model(folder, num_labels=19)


def cut(folder: Path) -> None:
    write_segmentation_model(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def without_a_weight(folder: Path) -> None:
    write_segmentation_model(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["decode_head.classifier.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def pickled(folder: Path) -> None:
    write_segmentation_model(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def changed(folder: Path, name: str, **values: Any) -> None:
    write_segmentation_model(folder)
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(settings | values))


def with_code(folder: Path) -> None:
    changed(folder, "config.json", model_type="new", auto_map={"AutoConfig": "code.C", "AutoModel": "code.M"})
    (folder / "code.py").write_text("raise SystemExit('it ran')")


def with_a_backbone_elsewhere(folder: Path) -> None:
    changed(folder, "config.json", model_type="upernet", backbone="owner/other", backbone_config=None)


def with_huge_images(folder: Path) -> None:
    changed(folder, "preprocessor_config.json", size={"height": 10**9, "width": 10**9})


def of_parts_that_do_not_fit(folder: Path) -> None:
    changed(folder, "config.json", num_channels=1)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("patch_embeddings.0.proj.weight"))
    tensors[name] = tensors[name][:, :1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without_a_processor(folder: Path) -> None:
    write_segmentation_model(folder)
    (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (other_labels, "tells 19 classes apart: expected ADE20K's 150"),
        (cut, "cannot be loaded (SafetensorError"),
        (without_a_weight, "lack decode_head.classifier.bias"),
        (pickled, "is a PyTorch pickle: expected safetensors weights"),
        (with_code, "cannot be loaded"),
        (with_a_backbone_elsewhere, "takes its backbone from elsewhere (owner/other)"),
        (with_huge_images, "has the number 1000000000: larger than any model's"),
        (of_parts_that_do_not_fit, "fails at an image (RuntimeError"),
        (without_a_processor, "cannot be loaded"),
        (Path.mkdir, "has no config.json"),
    ],
)
def test_a_model_that_is_none_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[[Path], None], said: str
) -> None:
    write(tmp_path / "model")
    words = ("--generated_circles", 2, "--condition", "segmentation", "--annotator_model", tmp_path / "model")
    assert annotate(tmp_path / "shards", *words) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert not (tmp_path / "shards").exists(), "another model may be named without deleting anything"


def test_depths_that_are_no_numbers_stop_the_work(tmp_path: Path) -> None:
    folder = write_depth_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor * np.nan for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="depths are no finite numbers"):
        open_depth(str(folder))


def test_strips_are_left_out_and_named(tmp_path: Path, depth_model: Path) -> None:
    samples = pairs(3)
    data = write_image_folder(tmp_path / "data", samples)
    PIL.Image.new("RGB", (400, 10)).save(data / "image" / "0001.png")
    words = ("--train_data_dir", data, "--condition", "depth", "--annotator_model", depth_model)
    assert annotate(tmp_path / "shards", *words) == 0
    (left_out,) = json.loads((tmp_path / "shards" / "packed.json").read_text())["left_out"]
    assert "0001.png" in left_out["sample"]
    assert "400 × 10 pixels" in left_out["reason"]
