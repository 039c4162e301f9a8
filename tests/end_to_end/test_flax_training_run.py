"""Whole training runs from the command line, on a tiny Stable Diffusion and generated circles."""

import json
import signal
import time
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.data.sources.circles import draw
from shared.diffusion.samplers import initial_latents
from tests.end_to_end.running import losses, metrics, start_train_flax, train_flax

SIZE = 64
STEPS = 6


def arguments(base_model: Path, output_dir: Path, *more: object) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(base_model)),
        *("--generated_circles", "24", "--resolution", str(SIZE)),
        *("--train_batch_size", "8", "--max_train_steps", str(STEPS)),
        *("--learning_rate", "1e-2", "--checkpointing_steps", "2"),
        *("--output_dir", str(output_dir)),
        *map(str, more),
    ]


@pytest.fixture(scope="module")
def condition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("validation") / "condition.png"
    draw(0, SIZE, seed=1).conditioning_image.save(path)
    return path


PROMPT = "red circle with blue background"


@pytest.fixture(scope="module")
def run(base_model: Path, condition: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything switched on. The other runs are compared with it."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    validation = ["--validation_image", condition, "--validation_prompt", PROMPT, "--validation_steps", 4]
    output = train_flax(arguments(base_model, output_dir, *validation, "--num_validation_images", 2))
    (output_dir / "output.txt").write_text(output)
    return output_dir


def test_the_banner_says_what_will_happen(run: Path) -> None:
    output = (run / "output.txt").read_text()
    for words in (
        "1 × cpu",
        "8 images per step = 8 per device × 1 devices × 1 accumulated",
        "24 generated circles",
        f"Steps       {STEPS}",
        "0.8 M parameters",
    ):
        assert words in output
    assert "loss=" in output  # the progress bar
    assert "lr=1.00e-02" in output


def test_the_folder_of_a_run_explains_itself(run: Path) -> None:
    entries = metrics(run)
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    assert entries[0].keys() >= {"loss", "grad_norm", "learning_rate", "images_per_second", "data_wait", "epoch"}
    assert entries[2]["epoch"] == pytest.approx(1.0)  # 3 steps of 8 images, 24 circles
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == STEPS
    assert report["images_seen"] == 8 * STEPS
    assert report["loss"] == entries[-1]["loss"]
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    pictures = [path.relative_to(run).as_posix() for path in sorted(run.glob("validation/*/*.png"))]
    assert pictures == ["validation/step-4/0.png", "validation/step-6/0.png"]
    card = huggingface_hub.ModelCard.load(run / "README.md")
    assert card.data.library_name == "diffusers"
    assert "controlnet" in card.data.tags
    assert f"validation/step-{STEPS}/0.png" in card.text


def test_tensorboard_shows_scalars_and_images(run: Path) -> None:
    events = EventAccumulator(str(run / "logs" / "train_controlnet")).Reload()
    assert {"loss", "grad_norm", "learning_rate", "images_per_second", "data_wait"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([event.value for event in events.Scalars("loss")], losses(run), rtol=1e-6)
    assert len(events.Tags()["images"]) == 3  # the condition and two samples


def test_a_finished_run_is_left_as_it_is(base_model: Path, run: Path) -> None:
    """The command of a run can be repeated until it is done, and once more."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "output.txt"}
    output = train_flax(arguments(base_model, run, "--resume_from_checkpoint", "latest"))
    assert "nothing left to do" in output
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_held_out_circles_are_measured_also_by_a_continued_run(base_model: Path, tmp_path: Path) -> None:
    more = ["--num_evaluation_samples", 3, "--evaluation_fidelity", "circles", "--validation_steps", 2]
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        for last_step in steps:
            resume = ["--resume_from_checkpoint", "latest"] if last_step != steps[0] else []
            train_flax(arguments(base_model, tmp_path / name, *more, *resume, "--max_train_steps", last_step))
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    measured = [entry["step"] for entry in whole if "circle_iou" in entry]
    assert measured == [0, 2, 4]
    timed = ("images_per_second", "data_wait")
    assert [{k: v for k, v in entry.items() if k not in timed} for entry in parts] == [
        {k: v for k, v in entry.items() if k not in timed} for entry in whole
    ]
    for name in ("whole", "parts"):
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["circle_iou"] == whole[-1]["circle_iou"]
        assert report["circle_iou_untrained"] == whole[0]["circle_iou"]
        assert report["validation_loss"] < report["validation_loss_untrained"] * 2
    sheets = [(tmp_path / name / "contact_sheet.png").read_bytes() for name in ("whole", "parts")]
    assert sheets[0] == sheets[1]


def test_the_configuration_can_be_run_again(base_model: Path, run: Path, tmp_path: Path) -> None:
    train_flax(["--config", run / "config.yaml", "--output_dir", tmp_path / "again", "--max_train_steps", 2])
    assert losses(tmp_path / "again") == losses(run)[:2]


def test_diffusers_draws_the_same_picture_with_the_trained_controlnet(
    base_model: Path, run: Path, condition: Path
) -> None:
    """The same latents and prompt through diffusers' pipeline give what our own sampler drew at the last step."""
    controlnet = diffusers.ControlNetModel.from_pretrained(run)
    pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        base_model, controlnet=controlnet, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    latents = torch.from_numpy(initial_latents(0, [0, 1], (8, 8, 4))).permute(0, 3, 1, 2)
    with PIL.Image.open(condition) as image:
        theirs = pipeline(
            [PROMPT] * 2,
            image=[image.convert("RGB")] * 2,
            latents=latents,
            num_inference_steps=20,
            guidance_scale=7.5,
            output_type="np",
        ).images
    events = EventAccumulator(str(run / "logs" / "train_controlnet"), size_guidance={"images": 0}).Reload()
    for index, expected in enumerate(theirs, start=1):
        encoded = events.Images(f"validation/0/{index}")[-1]
        assert encoded.step == STEPS
        ours = np.asarray(PIL.Image.open(_in_memory(encoded.encoded_image_string)), np.float32) / 255
        assert np.abs(ours - expected).max() < 2 / 255
    assert theirs.std() > 0.05  # not an empty picture


def _in_memory(content: bytes) -> "object":
    import io

    return io.BytesIO(content)


def test_training_changes_the_controlnet(base_model: Path, run: Path) -> None:
    trained = diffusers.ControlNetModel.from_pretrained(run)
    assert sum(block.weight.abs().sum().item() for block in trained.controlnet_down_blocks) > 0


def test_eight_devices_train_like_one(base_model: Path, run: Path, tmp_path: Path) -> None:
    train_flax(arguments(base_model, tmp_path, "--train_batch_size", 1, "--max_train_steps", 4), devices=8)
    np.testing.assert_allclose(losses(tmp_path), losses(run)[:4], rtol=1e-5)


def test_accumulated_and_threaded_batches_train_the_same(base_model: Path, run: Path, tmp_path: Path) -> None:
    more = ["--train_batch_size", 2, "--gradient_accumulation_steps", 4, "--dataloader_num_workers", 3]
    train_flax(arguments(base_model, tmp_path, *more, "--max_train_steps", 4))
    np.testing.assert_allclose(losses(tmp_path), losses(run)[:4], rtol=1e-5)


def test_a_resumed_run_continues_bit_for_bit(base_model: Path, run: Path, tmp_path: Path) -> None:
    """Optimizer, schedule and data position: the second half of a run is that of the run in one piece."""
    train_flax(arguments(base_model, tmp_path, "--max_train_steps", 4, "--checkpoints_total_limit", 1))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    train_flax(arguments(base_model, tmp_path, "--resume_from_checkpoint", "latest"))
    assert losses(tmp_path) == losses(run)
    resumed, whole = (diffusers.ControlNetModel.from_pretrained(folder).state_dict() for folder in (tmp_path, run))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_sigterm_saves_and_exits_with_success(base_model: Path, run: Path, tmp_path: Path) -> None:
    process = start_train_flax(
        arguments(base_model, tmp_path, "--max_train_steps", 100000, "--checkpointing_steps", 10**6)
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "--resume_from_checkpoint latest" in output
    (saved,) = tmp_path.glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert metrics(tmp_path)[-1]["step"] == step
    known = min(step, STEPS)
    assert losses(tmp_path)[:known] == losses(run)[:known]


def test_bf16_and_v_prediction_train(tmp_path: Path) -> None:
    from flax_trainer.random_model import write_random_model

    write_random_model("tiny", tmp_path / "base", prediction_type="v_prediction")
    more = ["--mixed_precision", "bf16", "--snr_gamma", 5, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2]
    train_flax(arguments(tmp_path / "base", tmp_path / "run", *more, "--max_train_steps", 3))
    entries = metrics(tmp_path / "run")
    assert all(np.isfinite(entry["loss"]) for entry in entries)
    assert [entry["learning_rate"] for entry in entries] == pytest.approx([0.0, 0.005, 0.01])
