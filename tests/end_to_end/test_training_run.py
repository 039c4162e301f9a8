"""Whole training runs of both backends from the command line, on a tiny Stable Diffusion and generated circles."""

import io
import json
import signal
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flax_trainer.random_model import write_random_model
from shared.diffusion.samplers import initial_latents
from tests.end_to_end.support.running import losses, metrics, stop_after, untimed_metrics
from tests.end_to_end.support.tiny_runs import BATCH, FLAX, FLAX_HERE, PROMPT, STEPS, TORCH, Backend, arguments


@pytest.fixture(scope="module", params=[FLAX_HERE, TORCH], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


def command(backend: Backend, base_model: Path, output_dir: Path, *more: object) -> list[str]:
    return arguments(base_model, output_dir, *more, devices=backend.devices)


@pytest.fixture(scope="module")
def run(backend: Backend, base_model: Path, condition: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything switched on. The other runs are compared with it."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    validation = ["--validation_image", condition, "--validation_prompt", PROMPT, "--validation_steps", 4]
    more = [*validation, "--num_validation_images", 2]
    output = backend.train_in_a_process(command(backend, base_model, output_dir, *more))
    (output_dir / "output.txt").write_text(output)
    return output_dir


def test_the_banner_says_what_will_happen(backend: Backend, run: Path) -> None:
    output = (run / "output.txt").read_text()
    for words in (
        backend.describes_device,
        f"8 images per step = {BATCH // backend.devices} per device × {backend.devices} devices × 1 accumulated",
        "24 generated circles",
        f"Steps       {STEPS}",
        "0.8 M parameters",
    ):
        assert words in output
    assert "loss=" in output  # the progress bar
    assert "lr=1.00e-02" in output


def test_the_folder_of_a_run_explains_itself(backend: Backend, run: Path) -> None:
    entries = metrics(run)
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    assert entries[0].keys() >= {"loss", "grad_norm", "learning_rate", "images_per_second", "data_wait", "epoch"}
    assert entries[2]["epoch"] == pytest.approx(1.0)  # 3 steps of 8 images, 24 circles
    report = json.loads((run / "report.json").read_text())
    assert report["backend"] == backend.name
    assert report["steps"] == STEPS
    assert report["images_seen"] == BATCH * STEPS
    assert report["loss"] == entries[-1]["loss"]
    pictures = [path.relative_to(run).as_posix() for path in sorted(run.glob("validation/*/*.png"))]
    assert pictures == ["validation/step-4/0.png", "validation/step-6/0.png"]
    card = huggingface_hub.ModelCard.load(run / "README.md")
    assert card.data.library_name == "diffusers"
    assert "controlnet" in card.data.tags
    assert f"validation/step-{STEPS}/0.png" in card.text


def test_the_folder_is_the_same_for_both_backends(run: Path) -> None:
    assert {path.name for path in run.iterdir()} - {"output.txt"} == {
        *("config.yaml", "metrics.jsonl", "logs", "validation", "report.json"),
        *("checkpoint-2", "checkpoint-4", "checkpoint-6"),
        *("diffusion_pytorch_model.safetensors", "config.json", "README.md"),
    }


def test_tensorboard_shows_scalars_and_images(run: Path) -> None:
    events = EventAccumulator(str(run / "logs" / "train_controlnet")).Reload()
    assert {"loss", "grad_norm", "learning_rate", "images_per_second", "data_wait"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([event.value for event in events.Scalars("loss")], losses(run), rtol=1e-6)
    assert len(events.Tags()["images"]) == 3  # the condition and two samples


def test_a_finished_run_is_left_as_it_is(backend: Backend, base_model: Path, run: Path) -> None:
    """The command of a run can be repeated until it is done, and once more."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "output.txt"}
    output = backend.train(command(backend, base_model, run, "--resume_from_checkpoint", "latest"))
    assert "nothing left to do" in output
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_held_out_circles_are_measured_also_by_a_continued_run(
    backend: Backend, base_model: Path, tmp_path: Path
) -> None:
    more = ["--num_evaluation_samples", 3, "--evaluation_fidelity", "circles", "--validation_steps", 2]
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        for last_step in steps:
            resume = ["--resume_from_checkpoint", "latest"] if last_step != steps[0] else []
            backend.train(command(backend, base_model, tmp_path / name, *more, *resume, "--max_train_steps", last_step))
    # Killed before it wrote its report: the last step is measured once more for that, and logged once.
    (tmp_path / "parts" / "report.json").unlink()
    (tmp_path / "parts" / "contact_sheet.png").unlink()
    backend.train(command(backend, base_model, tmp_path / "parts", *more, *resume, "--max_train_steps", 4))
    whole = metrics(tmp_path / "whole")
    assert [entry["step"] for entry in whole if "circle_iou" in entry] == [0, 2, 4]
    assert untimed_metrics(tmp_path / "parts") == untimed_metrics(tmp_path / "whole")
    for name in ("whole", "parts"):
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["circle_iou"] == whole[-1]["circle_iou"]
        assert report["circle_iou_untrained"] == whole[0]["circle_iou"]
        assert report["validation_loss"] < report["validation_loss_untrained"] * 2
    sheets = [(tmp_path / name / "contact_sheet.png").read_bytes() for name in ("whole", "parts")]
    assert sheets[0] == sheets[1]


def test_the_configuration_can_be_run_again(backend: Backend, base_model: Path, run: Path, tmp_path: Path) -> None:
    backend.train(["--config", run / "config.yaml", "--output_dir", tmp_path / "again", "--max_train_steps", 2])
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
        ours = np.asarray(PIL.Image.open(io.BytesIO(encoded.encoded_image_string)), np.float32) / 255
        assert np.abs(ours - expected).max() < 2 / 255
    assert theirs.std() > 0.05  # not an empty picture


def test_training_changes_the_controlnet(run: Path) -> None:
    trained = diffusers.ControlNetModel.from_pretrained(run)
    assert sum(block.weight.abs().sum().item() for block in trained.controlnet_down_blocks) > 0


def test_accumulated_and_threaded_batches_train_the_same(
    backend: Backend, base_model: Path, run: Path, tmp_path: Path
) -> None:
    more = ["--train_batch_size", 2, "--gradient_accumulation_steps", 4, "--dataloader_num_workers", 3]
    on_one_device = {"flax": FLAX, "torch": TORCH}[backend.name]
    on_one_device.train(arguments(base_model, tmp_path, *more, "--max_train_steps", 4))
    # AdamW's first steps have the sign of each gradient, so they amplify the rounding of sums in another order.
    np.testing.assert_allclose(losses(tmp_path), losses(run)[:4], rtol=3e-5)


def test_a_resumed_run_continues_bit_for_bit(backend: Backend, base_model: Path, run: Path, tmp_path: Path) -> None:
    """Optimizer, schedule and data position: the second half of a run is that of the run in one piece."""
    backend.train(command(backend, base_model, tmp_path, "--max_train_steps", 4, "--checkpoints_total_limit", 1))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    backend.train(command(backend, base_model, tmp_path, "--resume_from_checkpoint", "latest"))
    assert losses(tmp_path) == losses(run)
    resumed, whole = (diffusers.ControlNetModel.from_pretrained(folder).state_dict() for folder in (tmp_path, run))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_the_run(
    number: signal.Signals, exit_code: int, backend: Backend, base_model: Path, run: Path, tmp_path: Path
) -> None:
    endless = ["--max_train_steps", 100000, "--checkpointing_steps", 10**6]
    process = backend.start(command(backend, base_model, tmp_path, *endless))
    returned, output = stop_after(process, tmp_path, 3, number)
    assert returned == exit_code, output
    assert "--resume_from_checkpoint latest" in output
    (saved,) = tmp_path.glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert metrics(tmp_path)[-1]["step"] == step
    known = min(step, STEPS)
    assert losses(tmp_path)[:known] == losses(run)[:known]


def test_bf16_and_v_prediction_train(backend: Backend, tmp_path: Path) -> None:
    write_random_model("tiny", tmp_path / "base", prediction_type="v_prediction")
    more = ["--mixed_precision", "bf16", "--snr_gamma", 5, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2]
    backend.train(command(backend, tmp_path / "base", tmp_path / "run", *more, "--max_train_steps", 3))
    entries = metrics(tmp_path / "run")
    assert all(np.isfinite(entry["loss"]) for entry in entries)
    assert [entry["learning_rate"] for entry in entries] == pytest.approx([0.0, 0.005, 0.01])
