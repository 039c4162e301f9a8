"""Captions are those of transformers' own generate, and the shards with them train and can be annotated."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import webdataset
from transformers import BlipForConditionalGeneration, BlipProcessor

import shared.prepare_data.command
from shared.data.preprocessing import decode
from shared.data.sources import open_source
from shared.data.sources.base import RandomAccessSource
from shared.prepare_data.members import caption_member
from tests.shared.data.pictures import config, pairs, write_image_folder, write_images, write_tars
from tests.torch_trainer.prepare_data.tiny_models import write_captioner
from torch_trainer.prepare_data.captions import open_captioner
from torch_trainer.prepare_data.command import main

SAMPLES = pairs(7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioner(tmp_path_factory.mktemp("captioner") / "model")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[str]:
    """The captions of `SAMPLES`, one after the other."""
    blip, processor = BlipForConditionalGeneration.from_pretrained(model).eval(), BlipProcessor.from_pretrained(model)
    captions = []
    for sample in SAMPLES:
        with PIL.Image.open(io.BytesIO(sample["image"])) as picture:
            tokens = blip.generate(**processor(images=picture, return_tensors="pt"), max_new_tokens=40)
        captions.append(processor.decode(tokens[0], skip_special_tokens=True).strip())
    assert len(set(captions)) > 1
    return captions


def caption(output: Path, model: Path, *words: object) -> int:
    flags = ("--captioner_model", model, "--batch_size", 3, "--num_workers", 2, "--output_dir", output)
    return main(["caption", *map(str, (*flags, *words))])


def packed(output: Path) -> RandomAccessSource:
    source = open_source(config(train_shards=(f"{output}/*.tar",)))
    assert isinstance(source, RandomAccessSource)
    return source


def test_a_caption_is_what_generate_says(model: Path, expected: list[str]) -> None:
    captioner = open_captioner(str(model))
    prepared = [captioner.prepare(np.asarray(decode(sample["image"]))) for sample in SAMPLES]
    assert captioner.caption(prepared) == expected


@pytest.mark.parametrize("layout", ["image folder", "tars"])
def test_conditions_are_kept(tmp_path: Path, model: Path, expected: list[str], layout: str) -> None:
    if layout == "tars":
        words: tuple[object, ...] = ("--train_shards", write_tars(tmp_path / "data", SAMPLES))
    else:
        folder = write_image_folder(tmp_path / "data", [sample | {"text": "to be replaced"} for sample in SAMPLES])
        words = ("--train_data_dir", folder, "--conditioning_image_column", "conditioning_image")
    assert caption(tmp_path / "shards", model, *words) == 0
    source = packed(tmp_path / "shards")
    for number, text in enumerate(expected):
        assert source.captions(number) == (text,)
        assert source[number].image == SAMPLES[number]["image"]
        (condition,) = source[number].conditions
        assert decode(condition).tobytes() == decode(SAMPLES[number]["conditioning_image"]).tobytes()


@pytest.mark.parametrize("layout", ["bare folder", "metadata.jsonl", "tars"])
def test_images_alone_are_captioned_and_then_annotated(
    tmp_path: Path, model: Path, expected: list[str], layout: str
) -> None:
    words: tuple[object, ...] = ("--train_data_dir", tmp_path / "data")
    if layout == "tars":
        (tmp_path / "data").mkdir()
        with webdataset.TarWriter(str(tmp_path / "data" / "00000.tar")) as writer:
            for number, sample in enumerate(SAMPLES):
                writer.write({"__key__": f"{number:04d}", "jpg": sample["image"], "json": b"{}"})
        words = ("--train_shards", tmp_path / "data" / "00000.tar")
    else:
        write_images(tmp_path / "all", SAMPLES)
        (tmp_path / "all" / "image").rename(tmp_path / "data")
        if layout == "metadata.jsonl":
            rows = [json.dumps({"file_name": f"{number:04d}.png"}) + "\n" for number in range(len(SAMPLES))]
            (tmp_path / "data" / "metadata.jsonl").write_text("".join(rows))
            words = (*words, "--image_column", "file_name")
        else:
            words = (*words, "--cache_dir", tmp_path / "cache")
    assert caption(tmp_path / "captioned", model, *words) == 0
    with tarfile.open(tmp_path / "captioned" / "000000.tar") as tar:
        assert not [name for name in tar.getnames() if "conditioning_image" in name]
    annotating = ["annotate", "--train_shards", f"{tmp_path}/captioned/*.tar", "--condition", "grey", "--output_dir"]
    assert shared.prepare_data.command.main([*annotating, str(tmp_path / "shards")]) == 0
    source = packed(tmp_path / "shards")
    assert [source.captions(number)[0] for number in range(len(source))] == expected


def test_what_was_interrupted_ends_with_the_same_bytes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--train_shards", write_tars(tmp_path / "data", SAMPLES), "--samples_per_shard", 4, "--resolution", 32)
    assert caption(tmp_path / "shards", model, *words) == 0

    def interrupted(captions: tuple[str, ...]) -> Any:
        if len(list((tmp_path / "again").glob("*.tar"))) == 1:
            raise KeyboardInterrupt
        return caption_member(captions)

    with monkeypatch.context() as patched:
        patched.setattr("shared.prepare_data.captioning.caption_member", interrupted)
        assert caption(tmp_path / "again", model, *words) == 130
    first = (tmp_path / "again" / "000000.tar").stat()
    assert caption(tmp_path / "again", model, *words) == 0
    assert (tmp_path / "again" / "000000.tar").stat().st_ino == first.st_ino
    for shard in (tmp_path / "shards").glob("*.tar"):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()
