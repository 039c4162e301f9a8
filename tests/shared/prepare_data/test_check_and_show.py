import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from shared.data.decoded_pairs import PairDecoder
from shared.data.sample import MismatchedPairError, RawSample
from shared.prepare_data.command import main
from tests.shared.data.pictures import config, pairs, png, write_image_folder, write_tars


def write_faulty(folder: Path) -> dict[int, str]:
    """Ten pairs; what is wrong with which."""
    samples: list[dict[str, Any]] = [
        {"image": png(place, 40, 40), "conditioning_image": png(100 + place, 80, 80), "text": f"caption {place}"}
        for place in range(10)
    ]
    samples[1]["image"] = samples[1]["image"][:60]
    samples[3]["conditioning_image"] = png(3, 80, 60)
    samples[5]["image"], samples[5]["conditioning_image"] = samples[0]["image"], samples[0]["conditioning_image"]
    samples[6]["image"] = png(6, 20, 20)
    samples[7]["image"], samples[7]["conditioning_image"] = png(7, 200, 40), png(8, 100, 20)
    samples[8]["image"] = samples[2]["image"]  # another condition: no duplicate
    write_image_folder(folder, samples)
    return {1: "corrupt", 3: "mismatched", 5: "duplicated", 6: "small", 7: "long"}


@pytest.mark.parametrize("threads", ["0", "3"])
def test_each_fault_is_found_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: str) -> None:
    faults = write_faulty(tmp_path / "data")
    report = tmp_path / "faults.json"
    words = ["check", "--train_data_dir", str(tmp_path / "data"), "--resolution", "32", "--report", str(report)]
    assert main([*words, "--num_workers", threads]) == 1
    listed = {
        int(fault["sample"].partition(" line ")[2].split()[0]) - 1: fault for fault in json.loads(report.read_text())
    }
    assert {place: fault["kind"] for place, fault in listed.items()} == faults
    assert listed[5]["detail"].endswith("line 1 (image/0000.png)")
    said = capsys.readouterr().out
    for place, kind in faults.items():
        assert any(line.startswith(kind) and f" line {place + 1} " in line for line in said.splitlines())
    assert "Found: 1 corrupt, 1 mismatched, 1 small, 1 long, 1 duplicated" in said


def test_good_data_are_said_to_be_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--generated_circles", "4", "--resolution", "64", "--num_workers", "0"]) == 0
    assert capsys.readouterr().out == "Found: nothing\n"


def test_a_stream_is_checked(tmp_path: Path) -> None:
    write_tars(tmp_path, [*pairs(3), pairs(3)[1]])
    words = ["--train_shards", f"pipe:cat {tmp_path}/*.tar", "--allow_shell_urls", "--resolution", "32"]
    assert main(["check", *words, "--report", str(tmp_path / "faults.json")]) == 1
    (fault,) = json.loads((tmp_path / "faults.json").read_text())
    assert fault["kind"] == "duplicated"


@pytest.mark.parametrize("size", [(320, 240), (321, 240), (322, 240), (323, 240), (330, 240), (322, 242), (1000, 750)])
def test_mismatched_is_what_a_training_calls_so(tmp_path: Path, size: tuple[int, int]) -> None:
    sample = {"image": png(1, 320, 240), "conditioning_image": png(2, *size), "text": "a caption"}
    write_image_folder(tmp_path, [sample])
    exit_code = main(["check", "--train_data_dir", str(tmp_path), "--resolution", "32"])
    pair = RawSample(sample["image"], (sample["conditioning_image"],), ("a caption",), "a pair")
    with pytest.raises(MismatchedPairError) if exit_code else nullcontext():
        PairDecoder(config(resolution=32))(pair)


def test_a_sheet_shows_conditions_beside_images(tmp_path: Path) -> None:
    sheet = tmp_path / "sheets" / "s.png"
    words = ["--generated_circles", "5", "--resolution", "200", "--num_samples", "2", "--output_file", str(sheet)]
    assert main(["show", *words]) == 0
    with PIL.Image.open(sheet) as picture:
        pixels_HWC = np.asarray(picture.convert("RGB"))
    assert pixels_HWC.shape[1] == 16 + 200 + 8 + 200 + 16
    assert pixels_HWC.shape[0] > 2 * 200
    first = pixels_HWC.tobytes()
    assert main(["show", *words, "--seed", "1"]) == 0
    with PIL.Image.open(sheet) as picture:
        assert picture.convert("RGB").tobytes() != first


def test_bad_samples_are_left_out_of_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_faulty(tmp_path)
    words = ["show", "--train_data_dir", str(tmp_path), "--resolution", "32", "--output_file", str(tmp_path / "s.png")]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "line 2 (image/0001.png) is left out" in said
    assert "shows 9 samples" in said


def _place(name: str) -> int:
    """Of the sample that is called "FOLDER/metadata.jsonl line N (…)"."""
    return int(name.partition(" line ")[2].split()[0]) - 1
