"""What is drawn, kept, measured and written, with a backend that paints what it is told."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flax_trainer.evaluate
from shared.evaluate import command
from tests.shared.data.pictures import pairs, write_tars
from tests.shared.evaluate.brush import SIDE, Brush, Pixels, figures, never, of_list, record

Evaluated = Callable[..., Path]


def blank(number: int) -> Pixels:
    return np.full((SIDE, SIDE, 3), 20 * number, np.uint8)


def test_truth_as_pictures_follows_its_edges_and_shuffled_pairs_do_not(
    evaluated: Evaluated, truths: list[Pixels], tmp_path: Path
) -> None:
    perfect = figures(evaluated(Brush(of_list(truths))))
    assert perfect == dict.fromkeys(("edge_f1", "edge_precision", "edge_recall", "edge_ssim"), pytest.approx(1))
    shutil.rmtree(tmp_path / "out")
    shuffled = figures(evaluated(Brush(of_list([*truths[1:], truths[0]]))))
    assert all(value < 0.5 for value in shuffled.values())


def test_what_was_interrupted_goes_on(evaluated: Evaluated, truths: list[Pixels]) -> None:
    first = Brush(of_list(truths), until=5)
    with pytest.raises(KeyboardInterrupt):
        evaluated(first)
    assert first.drawn == [0, 1, 2, 3]
    second = Brush(of_list(truths))
    folder = evaluated(second)
    assert second.drawn == [4, 5, 6, 7]
    assert second.prompts == ["part 4", "part 5", "part 6", "part 7"]
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "index.html", "pictures"]
    (folder / "pictures" / "000002.png").unlink()
    third = Brush(of_list(truths))
    evaluated(third)
    assert third.drawn == [2]


def test_what_was_interrupted_says_what_is_missing(evaluated: Evaluated, truths: list[Pixels], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluated(Brush(of_list(truths), until=5))
    found = record(tmp_path / "out")
    assert found["finished"] is False
    assert found["not_measured"]["edges"] == "not measured yet: the same command goes on"
    assert found["not_measured"]["colours"] == "not asked for (--metrics)"


def test_figures_are_kept_and_others_come_beside_them(
    evaluated: Evaluated, truths: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = record(evaluated(Brush(of_list(truths))))
    monkeypatch.setattr("shared.evaluate.metrics.edges.measure", never)
    after = record(evaluated(Brush(never), "--metrics", "colours"))
    assert after["finished"] is True
    assert after["metrics"]["edges"] == before["metrics"]["edges"]
    assert list(after["metrics"]) == ["edges", "colours"]
    evaluated(Brush(never), "--metrics", "edges", "colours")


def test_what_was_measured_otherwise_is_measured_again(evaluated: Evaluated, truths: list[Pixels]) -> None:
    folder = evaluated(Brush(of_list(truths)), "--metrics", "edges", "colours")
    whole, path = record(folder), folder / "evaluation.json"
    changed = record(folder)
    changed["metrics"]["edges"]["settings"]["extractor"] = "another"
    changed["metrics"]["edges"]["found"]["figures"]["edge_f1"]["value"] = 7
    del changed["metrics"]["colours"]["found"]["of_conditions"]["colour_difference"][3:]
    path.write_text(json.dumps(changed))
    evaluated(Brush(never), "--metrics", "edges", "colours")
    assert record(folder) == whole
    path.write_text(json.dumps(whole | {"metrics": {"edges": {"settings": {}, "found": 3}}}))
    with pytest.raises(ValueError, match=r"evaluation\.json holds something else than expected"):
        evaluated(Brush(never))


def test_figures_come_with_their_errors(evaluated: Evaluated, truths: list[Pixels]) -> None:
    """Two pictures of each condition, the truth and a blank one: F1 of both together, and the error of their mean."""
    pictures = [picture for number, truth in enumerate(truths) for picture in (truth, blank(number))]
    brush = Brush(of_list(pictures))
    found = record(evaluated(brush, "--num_images_per_prompt", 2, "--metrics", "edges", "colours"))
    assert dict(zip(brush.drawn, brush.prompts, strict=True)) == {number: f"part {number // 2}" for number in range(16)}
    assert (found["pairs"], found["pictures"]) == (8, 16)
    edges = found["metrics"]["edges"]["found"]
    recall = edges["figures"]["edge_recall"]
    assert recall == {
        "value": pytest.approx(0.5),
        "standard_error": pytest.approx(0),
        "conditions": 8,
        "pictures": 16,
        "better": "higher",
        "note": "",
    }
    colours = found["metrics"]["colours"]["found"]
    values = np.array(colours["of_conditions"]["colour_difference"])
    assert len(values) == 8
    figure = colours["figures"]["colour_difference"]
    assert figure["value"] == pytest.approx(values.mean())
    assert figure["standard_error"] == pytest.approx(np.sqrt(((values - values.mean()) ** 2).sum() / 7 / 8))
    assert figure["better"] == "lower"


def test_the_page_shows_figures_and_pairs(evaluated: Evaluated, truths: list[Pixels], data: Path) -> None:
    list_of_pairs = data / "prompt.json"
    list_of_pairs.write_text(list_of_pairs.read_text().replace("part 0", "<script>0</script>"))
    pictures = [*truths[:7], blank(7)]
    page = (evaluated(Brush(of_list(pictures))) / "index.html").read_text(encoding="utf-8")
    assert "--conditioning_image_column" not in page, "it was not given"
    assert "<script>" not in page
    assert "&lt;script&gt;0" in page
    for text in ("edge_f1", "0.875", "The worst, by edge_f1", "--eval_data"):
        assert text in page, text
    of_worst = page[page.index("The worst") : page.index("The best")]
    assert next(re.finditer(r"pair (\d+)", of_worst))[1] == "7"
    assert page.count('src="data:image/webp;base64,') == 3 * 6 * 3, "condition, picture and truth of six pairs, thrice"


def test_bad_pairs_are_left_out(evaluated: Evaluated, truths: list[Pixels], data: Path) -> None:
    """And of several captions the first is drawn."""
    rows = data / "prompt.json"
    rows.write_text(rows.read_text().replace('"part 2"', '["part 2", "something else"]'))
    (data / "target" / "1.png").write_bytes(b"no picture")
    brush = Brush(of_list(truths))
    found = record(evaluated(brush, "--num_samples", 3))
    assert (found["pairs"], found["pairs_skipped"]) == (3, 1)
    assert brush.prompts == ["part 0", "part 2", "part 3"]


def test_shards_are_read_as_folders_are(evaluated: Evaluated, tmp_path: Path) -> None:
    shards = write_tars(tmp_path / "shards", pairs(9), per_shard=5)
    brush = Brush(blank)
    found = record(evaluated(brush, "--eval_data", shards, "--num_samples", 7, "--metrics", "colours"))
    assert brush.prompts == [f"caption {place}" for place in range(7)]
    shutil.move(tmp_path / "shards", tmp_path / "moved")
    moved = str(shards).replace("/shards/", "/moved/")
    assert (
        record(evaluated(Brush(never), "--eval_data", moved, "--num_samples", 7))["drawn_with"] == found["drawn_with"]
    )


def test_conditions_are_those_of_the_data(evaluated: Evaluated, data: Path, tmp_path: Path) -> None:
    """Wide pictures are cut out of the middle, as a training cuts them."""
    seen: list[Pixels] = []
    for name in ("source", "target"):
        for path in (data / name).iterdir():
            Image.new("RGB", (96, 48), "navy").save(path)

    class Looks(Brush):
        def _draw(self, prompts: list[str], conditions_RHWC: np.ndarray, numbers: list[int]) -> np.ndarray:
            seen.extend(conditions_RHWC)
            return conditions_RHWC

    evaluated(Looks(never), "--height", 32, "--width", 64, "--num_samples", 2, "--metrics", "colours")
    assert [condition.shape for condition in seen] == [(32, 64, 3)] * 2
    assert figures(tmp_path / "out", "colours")["colour_difference"] == pytest.approx(0)


def test_pictures_that_were_drawn_otherwise_are_not_mixed(
    evaluated: Evaluated, truths: list[Pixels], controlnet: Path, data: Path
) -> None:
    evaluated(Brush(of_list(truths)))
    with pytest.raises(
        ValueError, match=r"drawn otherwise: num_inference_steps was 20 and is 4; seed was 0 and is 1\."
    ):
        evaluated(Brush(never), "--seed", 1, "--num_inference_steps", 4)
    with pytest.raises(ValueError, match=r'drawn otherwise: backend was "flax" and is "torch"'):
        evaluated(Brush(never), backend="torch")
    weights = controlnet / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + b"\1")
    with pytest.raises(ValueError, match="drawn otherwise: controlnets was"):
        evaluated(Brush(never))
    weights.write_bytes(before)
    (data / "prompt.json").write_text((data / "prompt.json").read_text().replace("part 0", "another"))
    with pytest.raises(ValueError, match=r"drawn otherwise: data was .*fingerprint"):
        evaluated(Brush(never))


def test_other_files_are_left_alone(evaluated: Evaluated, tmp_path: Path) -> None:
    (tmp_path / "out" / "pictures").mkdir(parents=True)
    (tmp_path / "out" / "pictures" / "mine.png").touch()
    with pytest.raises(ValueError, match=r"holds files that are not of an evaluation \(pictures\)"):
        evaluated(Brush(never))
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"\(notes.txt, pictures\)"):
        evaluated(Brush(never))


def test_a_damaged_picture_is_named(evaluated: Evaluated, truths: list[Pixels]) -> None:
    folder = evaluated(Brush(of_list(truths)), "--metrics", "colours")
    (folder / "pictures" / "000003.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"000003\.png cannot be read: .*Delete it"):
        evaluated(Brush(never))
    Image.new("RGB", (8, 8)).save(folder / "pictures" / "000003.png")
    with pytest.raises(ValueError, match=r"000003\.png has 8x8 pixels; expected 64x64"):
        evaluated(Brush(never))


def test_ctrl_c_says_how_to_go_on(
    controlnet: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "set_up_logging", lambda package: None)

    def interrupted(commission: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flax_trainer.evaluate, "_make_artist", interrupted)
    words = ["--controlnet_model_name_or_path", controlnet, "--eval_data", data, "--metrics", "edges"]
    assert flax_trainer.evaluate.main([*map(str, words), "--output_dir", str(tmp_path / "out")]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
