"""Mistakes of whoever asks for an evaluation: each is a sentence before a model is loaded."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.evaluate.command import print_help, read_command
from shared.evaluate.options import EVALUATE_FLAGS
from tests.shared.data.pictures import pairs, write_prompt_json
from tests.shared.evaluate.brush import Brush, never

NEEDED = ["--controlnet_model_name_or_path", "run", "--eval_data", "data", "--metrics", "edges"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (NEEDED[2:], "--controlnet_model_name_or_path is missing"),
        (NEEDED[:2] + NEEDED[4:], "--eval_data is missing"),
        (NEEDED[:4], "--metrics is missing: say what to measure, of edges, colours"),
        ([*NEEDED, "edges"], "--metrics names edges twice"),
        ([*NEEDED, "sharpness"], "--metrics must be one of edges, colours"),
        ([*NEEDED, "--num_samples", "0"], "--num_samples must be 1 or more"),
        ([*NEEDED, "--height", "64"], "--height and --width go together"),
        ([*NEEDED, "--guidance_scale", "1", "--negative_prompt", "x"], "--negative_prompt has no effect"),
        ([*NEEDED, "--output_dir", "gs://bucket/out"], "--output_dir is 'gs://bucket/out', an address"),
        ([*NEEDED, "--eval_dta", "x"], "did you mean --eval_data"),
    ],
)
def test_mistakes_in_flags(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_command(words)


def test_mistakes_about_the_data(evaluated: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    for words, message in (
        (["--eval_data", tmp_path / "nowhere"], r"--eval_data: there is no folder .*nowhere"),
        (["--eval_data", data, data], r"--eval_data names 2 places"),
        (["--eval_data", tmp_path / "nowhere.tar"], r"nowhere\.tar"),
        (["--num_samples", 9], r"--num_samples is 9, and --eval_data holds 8 usable pairs of 8"),
        (["--conditioning_image_column", "source", "target"], r"have 2 condition images .* take 1"),
        (["--resolution", 60], r"--resolution is 60, but the base model's VAE works on multiples of"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluated(Brush(never), *words)


def test_no_pair_can_be_used(evaluated: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_prompt_json(tmp_path / "broken", pairs(2))
    for path in (folder / "image").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="--eval_data holds 0 usable pairs of 2"):
        evaluated(Brush(never), "--eval_data", folder)


def test_what_metrics_need(
    evaluated: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_model: Path
) -> None:
    nowhere = ["--metrics", "clip_score", "--clip_model_name_or_path", tmp_path / "nowhere"]
    with pytest.raises(ValueError, match="nowhere' is not a local folder"):
        evaluated(Brush(never), *nowhere)
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("torch", "cv2") else find(name))
    with pytest.raises(
        ValueError, match=r"clip_score .* torch is not installed\. Run: pip install torch \(where there"
    ):
        evaluated(Brush(never), *nowhere)
    with pytest.raises(ValueError, match=r"--metrics edges needs OpenCV.*pip install opencv-python-headless"):
        evaluated(Brush(never))


def test_sets_of_pictures_need_some(
    evaluated: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_trainer.picture_models.inception.load_features", lambda path: None)
    (tmp_path / "weights").touch()
    metric = ["--metrics", "fid", "--inception_weights", tmp_path / "weights"]
    with pytest.raises(ValueError, match=r"--metrics fid compares sets .* needs 3 pairs at least, and there are 2"):
        evaluated(Brush(never), *metric, "--num_samples", 2)


@pytest.mark.parametrize("backend", ["flax", "torch"])
def test_help_lists_every_flag(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_help(backend)  # type: ignore[arg-type]
    text = capsys.readouterr().out
    assert f"python3 -m {backend}_trainer.evaluate" in text
    for name in EVALUATE_FLAGS:
        assert f"--{name}" in text


def test_a_mistake_needs_neither_jax_nor_torch(evaluated: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jax", "torch", "diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="--num_samples is 9"):
        evaluated(Brush(never), "--num_samples", 9)
