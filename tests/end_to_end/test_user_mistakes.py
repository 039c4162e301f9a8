"""Each mistake gives one message that says what was given, what was expected and how to fix it; no traceback.

Most are found by code that both backends share, and are tried with one of them.
"""

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import webdataset

import train_flax
from tests.end_to_end.support.running import main_of_train_torch
from tests.shared.data.pictures import write_circles_folder

SIZE = 64
MAIN = {"flax": train_flax.main, "torch": main_of_train_torch}
DEVICES = {"flax": 8, "torch": 1}
Fail = Callable[..., str]

on_both_backends = pytest.mark.parametrize("backend", ["flax", "torch"], indirect=True)
in_pytorch = pytest.mark.parametrize("backend", ["torch"], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", "flax")


@pytest.fixture
def fail(backend: str, base_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Fail:
    """Runs an entry point with arguments that must not work; returns its error message."""

    def run(*arguments: object, model: object = base_model, steps: int | None = 2) -> str:
        try:
            exit_code = MAIN[backend](
                [
                    *("--pretrained_model_name_or_path", str(model), "--resolution", str(SIZE)),
                    *("--train_batch_size", "2", "--output_dir", str(tmp_path / "run")),
                    *(() if steps is None else ("--max_train_steps", str(steps))),
                    *map(str, arguments),
                ]
            )
        except SystemExit as stopped:
            exit_code = stopped.code
        output = capfd.readouterr()
        assert exit_code == 2, output.err
        assert "Traceback" not in output.err
        _, message = output.err.split("error: ")
        return message

    return run


@pytest.fixture
def circles(tmp_path: Path) -> Path:
    folder = tmp_path / "circles"
    write_circles_folder(folder, 8, SIZE, seed=0)
    return folder


@pytest.fixture(scope="module")
def finished_run(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A backend's run of two steps with 8 circles each, trained once."""

    @cache
    def run(backend: str) -> Path:
        output_dir = tmp_path_factory.mktemp(backend) / "run"
        arguments = [
            *("--pretrained_model_name_or_path", str(base_model), "--resolution", str(SIZE)),
            *("--generated_circles", "8", "--train_batch_size", str(8 // DEVICES[backend]), "--max_train_steps", "2"),
            *("--checkpointing_steps", "2", "--report_to", "none", "--output_dir", str(output_dir)),
        ]
        assert MAIN[backend](arguments) == 0
        return output_dir

    return run


@pytest.fixture
def compiled_step(finished_run: Callable[[str], Path]) -> None:
    """Flax's, in the cache: a run that fails early leaves a compiler behind that works on for the next tests' time."""
    finished_run("flax")


@on_both_backends
def test_wrong_model_path(fail: Fail, tmp_path: Path) -> None:
    message = fail("--generated_circles", 8, model=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    assert "not a local folder" in message


def test_model_folder_without_a_part(fail: Fail, base_model: Path, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    for part in ("scheduler", "tokenizer", "unet"):
        (partial / part).mkdir(parents=True)
        for file in (base_model / part).iterdir():
            (partial / part / file.name).symlink_to(file)
    message = fail("--generated_circles", 8, model=partial)
    assert "no subfolder 'text_encoder'" in message
    assert "scheduler, tokenizer, unet" in message


_WEB, _FTP, _COMMAND = (
    "https://user:PASSWORD@host.invalid/x",
    "ftp://host.invalid/x?token=PASSWORD",
    " pipe:curl PASSWORD",
)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--pretrained_model_name_or_path", _WEB),
        ("--pretrained_vae_model_name_or_path", _FTP),
        ("--controlnet_model_name_or_path", _WEB),
        ("--tokenizer_name", _FTP),
        ("--dataset_name", _WEB),
        ("--train_data_dir", _FTP),
        ("--train_shards", _COMMAND),
        ("--train_shards", _FTP),
        ("--validation_image", _WEB),
        ("--resume_from_checkpoint", _WEB),
        ("--config", _COMMAND),
        ("--output_dir", _WEB),
    ],
)
def test_passwords_of_addresses_are_not_told(fail: Fail, flag: str, value: str) -> None:
    arguments = [] if flag in ("--dataset_name", "--train_data_dir", "--train_shards") else ["--generated_circles", 8]
    if flag == "--validation_image":
        arguments += ["--validation_prompt", "a circle"]
    assert "PASSWORD" not in fail(*arguments, flag, value)


def test_wrong_data_path(fail: Fail) -> None:
    message = fail("--train_data_dir", "/nowhere/to/be/found")
    assert "'/nowhere/to/be/found', which is not a folder; give one that exists" in message


@on_both_backends
def test_missing_column(fail: Fail, circles: Path) -> None:
    rows = [json.loads(line) for line in (circles / "prompt.json").read_text().splitlines()]
    lines = [json.dumps({"file_name": row["target"], "edges": row["source"], "text": row["prompt"]}) for row in rows]
    (circles / "prompt.json").unlink()
    (circles / "metadata.jsonl").write_text("\n".join(lines))
    message = fail("--train_data_dir", circles)
    assert "--conditioning_image_column" in message
    assert "edges" in message


@pytest.mark.usefixtures("compiled_step")
def test_corrupt_images_stop_the_run_past_the_limit(fail: Fail, circles: Path) -> None:
    for index in range(3):
        (circles / "target" / f"{index}.png").write_bytes(b"not a picture")
    message = fail("--train_data_dir", circles, "--max_skipped_samples", 1, "--train_batch_size", 1)
    assert "--max_skipped_samples" in message
    assert ".png" in message


@pytest.mark.usefixtures("compiled_step")
def test_images_without_their_condition_stop_the_run_past_the_limit(fail: Fail, circles: Path) -> None:
    (circles / "source" / "2.png").unlink()
    message = fail("--train_data_dir", circles, "--max_skipped_samples", 0, "--train_batch_size", 1)
    assert "2.png" in message


def test_unknown_flag(fail: Fail) -> None:
    assert "did you mean --train_batch_size?" in fail("--generated_circles", 8, "--train_batchsize", 3)


def test_devices_that_groups_do_not_divide(fail: Fail) -> None:
    message = fail("--generated_circles", 8, "--parallelism", "mesh", "--fsdp_devices", 3)
    assert "--fsdp_devices is 3, but the run has 8 devices" in message
    assert "Give one of 1, 2, 4, 8" in message


def test_processes_without_an_address(fail: Fail) -> None:
    message = fail("--generated_circles", 8, "--num_processes", 2, "--process_id", 0)
    assert "--coordinator_address is missing" in message


def test_resolution_that_the_vae_cannot_divide(fail: Fail) -> None:
    message = fail("--generated_circles", 8, "--resolution", 60)
    assert "divisible by 8" in message
    assert "60" in message


@pytest.fixture
def checkpoint(backend: str, finished_run: Callable[[str], Path], tmp_path: Path) -> Path:
    """That of a finished run, in a copy of its folder."""
    return Path(shutil.copytree(finished_run(backend), tmp_path / "run")) / "checkpoint-2"


@on_both_backends
@pytest.mark.usefixtures("checkpoint")
def test_batch_that_does_not_fit_the_checkpoint(fail: Fail, backend: str) -> None:
    """Batches belong to a run: continuing with another global batch size would repeat or skip samples."""
    twice = 16 // DEVICES[backend]
    message = fail("--generated_circles", 8, "--train_batch_size", twice, "--resume_from_checkpoint", "latest", steps=3)
    assert "global batch size" in message
    assert "8 in the checkpoint, 16 now" in message


@in_pytorch
def test_checkpoint_beyond_the_end(fail: Fail, checkpoint: Path) -> None:
    message = fail("--generated_circles", 8, "--resume_from_checkpoint", checkpoint, steps=1)
    assert "is at step 2, but the run is to end at step 1" in message
    assert "--max_train_steps" in message


@pytest.mark.usefixtures("checkpoint")
def test_other_data_than_the_checkpoints(fail: Fail) -> None:
    message = fail("--generated_circles", 9, "--train_batch_size", 1, "--resume_from_checkpoint", "latest", steps=3)
    assert "data samples: 8 in the checkpoint, 9 now" in message


def test_a_new_run_does_not_mix_with_an_old_one(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    assert "--resume_from_checkpoint latest" in fail("--generated_circles", 8)


def test_output_folder_that_cannot_be_made(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in fail("--generated_circles", 8, "--output_dir", tmp_path / "file" / "run")


def test_validation_image_that_does_not_exist(fail: Fail) -> None:
    message = fail("--generated_circles", 8, "--validation_image", "nope.png", "--validation_prompt", "a circle")
    assert "no file nope.png" in message


def test_a_stream_needs_to_know_when_to_stop(fail: Fail, circles: Path, tmp_path: Path) -> None:
    tar = tmp_path / "circles.tar"
    with webdataset.TarWriter(str(tar)) as writer:
        image, condition = ((circles / kind / "0.png").read_bytes() for kind in ("target", "source"))
        writer.write({"__key__": "0", "png": image, "cond.png": condition, "txt": "a circle"})
    message = fail("--train_shards", f"pipe:cat {tar}", "--allow_shell_urls", steps=None)
    assert "Give --max_train_steps" in message


@in_pytorch
@pytest.mark.parametrize("said_to", ["train_torch.py", "accelerate"])
def test_fp16_without_an_accelerator(fail: Fail, said_to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if said_to == "accelerate":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        message = fail("--generated_circles", 8)
    else:
        message = fail("--generated_circles", 8, "--mixed_precision", "fp16")
    assert "fp16 needs an accelerator" in message
    assert "--mixed_precision bf16" in message


@in_pytorch
def test_processes_that_do_not_know_of_each_other(fail: Fail) -> None:
    """They would all write to the same folder."""
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "2"}):  # and not with monkeypatch: accelerate sets more of them
        message = fail("--generated_circles", 8)
    assert "`MASTER_ADDR` env was not set" in message
    assert "`accelerate launch`" in message
