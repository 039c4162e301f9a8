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
from xprof.convert import raw_to_tool_data

from flax_trainer.random_model import write_random_model
from shared.diffusion.samplers import initial_latents
from tests.end_to_end.support.comparing import trained_weights
from tests.end_to_end.support.full_disk import assert_a_checkpoint_without_room_ends_the_run
from tests.end_to_end.support.running import (
    losses,
    main_of_train_torch,
    metrics,
    stop_after,
    train_flax,
    untimed_metrics,
)
from tests.end_to_end.support.tiny_runs import (
    BATCH,
    FLAX_HERE,
    ONE_RESOLUTION,
    PROMPT,
    STEPS,
    TORCH,
    Backend,
    arguments,
    begin_from,
)
from train_flax import main as main_of_train_flax

HELD_OUT = ["--generated_circles", 27, "--num_evaluation_samples", 3]


@pytest.fixture(scope="module", params=[FLAX_HERE, TORCH], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


def command(backend: Backend, base_model: Path, output_dir: Path, *more: object) -> list[str]:
    return arguments(base_model, output_dir, *HELD_OUT, *more, devices=backend.devices)


@pytest.fixture(scope="module")
def everything(condition: Path) -> list[object]:
    """Validation images, and figures on held-out circles."""
    return [
        *("--validation_image", condition, "--validation_prompt", PROMPT, "--num_validation_images", 2),
        *("--evaluation_fidelity", "circles", "--validation_steps", 4),
    ]


@pytest.fixture(scope="module")
def run(backend: Backend, base_model: Path, everything: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything switched on. The other runs are compared with it.

    Profiles change no number. Flax's are in `test_tensorboard_shows_the_run.py`, of one device.
    """
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    profiling = ["--profile_steps", 2, "--profile_validation"] if backend is TORCH else []
    output = backend.train_in_a_process(command(backend, base_model, output_dir, *everything, *profiling))
    (output_dir / "output.txt").write_text(output)
    return output_dir


@pytest.mark.parametrize("backend", [FLAX_HERE], indirect=True)
def test_a_run_in_flax_needs_neither_torch_nor_diffusers(run: Path) -> None:
    """Validation included. Nobody is to think that something is missing."""
    assert "PyTorch" not in (run / "output.txt").read_text()


def test_the_banner_says_what_will_happen(backend: Backend, run: Path) -> None:
    output = (run / "output.txt").read_text()
    for words in (
        backend.describes_device,
        f"8 images per step = {BATCH // backend.devices} per device × {backend.devices} devices × 1 accumulated",
        "27 generated circles",
        f"Steps       {STEPS}",
        "0.6 M parameters",
    ):
        assert words in output
    assert "loss=" in output  # the progress bar
    assert "lr=1.00e-02" in output


def test_the_folder_of_a_run_explains_itself(backend: Backend, run: Path) -> None:
    untrained, *entries = metrics(run)
    assert untrained["step"] == 0
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    assert entries[0].keys() >= {"loss", "grad_norm", "learning_rate", "images_per_second", "data_wait", "epoch"}
    assert entries[0]["model_tflops_per_second"] > 0
    assert "mfu" not in entries[0], "nobody knows the peak of a CPU"
    assert entries[2]["epoch"] == pytest.approx(1.0)  # 3 steps of 8 images, 24 circles
    report = json.loads((run / "report.json").read_text())
    assert report["backend"] == backend.name
    assert report["steps"] == STEPS
    assert report["images_seen"] == BATCH * STEPS
    assert report["loss"] == entries[-1]["loss"]
    assert report["model_tflops_per_second"] == entries[-1]["model_tflops_per_second"]
    pictures = [path.relative_to(run).as_posix() for path in sorted(run.glob("validation/*/*.png"))]
    assert pictures == [
        "validation/step-0/held_out.png",
        *(f"validation/step-{step}/{name}.png" for step in (4, 6) for name in ("0", "held_out")),
    ]
    card = huggingface_hub.ModelCard.load(run / "README.md")
    assert card.data.library_name == "diffusers"
    assert "controlnet" in card.data.tags
    assert f"validation/step-{STEPS}/0.png" in card.text


def test_the_folder_is_the_same_for_both_backends(run: Path) -> None:
    assert {path.name for path in run.iterdir()} - {"output.txt"} == {
        *("config.yaml", "metrics.jsonl", "logs", "validation", "report.json"),
        *("checkpoint-2", "checkpoint-4", "checkpoint-6"),
        *("diffusion_pytorch_model.safetensors", "config.json", "README.md", "contact_sheet.png"),
    }


def test_tensorboard_shows_scalars_and_images(run: Path) -> None:
    events = EventAccumulator(str(run / "logs" / "train_controlnet")).Reload()
    assert {"loss", "grad_norm", "learning_rate", "images_per_second", "data_wait"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([event.value for event in events.Scalars("loss")], losses(run), rtol=1e-6)
    assert len([tag for tag in events.Tags()["images"] if tag.startswith("validation/0/")]) == 3  # condition, samples


@pytest.mark.parametrize("backend", [TORCH], indirect=True)
def test_pytorch_profiles_steps_and_the_last_validation(run: Path) -> None:
    """TensorBoard's plugin converts them so; `test_tensorboard_shows_the_run.py` asks it for those of Flax."""
    assert f"tensorboard --logdir {run / 'logs'}" in (run / "output.txt").read_text()
    steps, validation = (drawn_in(run / "logs" / name) for name in ("profile_steps", "profile_validation"))
    assert {"train 3", "train 4"} == {name for name in steps if name.startswith("train ")}
    forward = {"vae", "text_encoder", "controlnet", "unet"}
    assert steps >= forward | {"data_wait", "host_to_device", "unet backward", "controlnet backward", "optimizer"}
    assert validation >= forward
    assert "unet backward" not in validation


def drawn_in(folder: Path) -> set[str]:
    """What the trace viewer draws of the only profile in a folder."""
    (file,) = folder.rglob("*.xplane.pb")
    converted, _ = raw_to_tool_data.xspace_to_tool_data([str(file)], "trace_viewer", {})
    return {event["name"] for event in json.loads(converted)["traceEvents"] if event.get("ph") == "X"}


def test_a_finished_run_is_left_as_it_is(backend: Backend, base_model: Path, run: Path) -> None:
    """The command of a run can be repeated until it is done, and once more."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "output.txt"}
    output = backend.train(command(backend, base_model, run, "--resume_from_checkpoint", "latest"))
    assert "nothing left to do" in output
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_configuration_can_be_run_again(backend: Backend, base_model: Path, run: Path, tmp_path: Path) -> None:
    shorter = ["--max_train_steps", 2, "--profile_steps", 0, "--no_profile_validation"]
    backend.train(["--config", run / "config.yaml", "--output_dir", tmp_path / "again", *shorter])
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
    on_one_device = {"flax": train_flax, "torch": TORCH.train}[backend.name]
    on_one_device(arguments(base_model, tmp_path, *HELD_OUT, *more, "--max_train_steps", 4))
    # AdamW's first steps have the sign of each gradient, so they amplify the rounding of sums in another order.
    np.testing.assert_allclose(losses(tmp_path), losses(run)[:4], rtol=3e-5)


def test_a_resumed_run_continues_bit_for_bit(
    backend: Backend, base_model: Path, run: Path, everything: list[object], tmp_path: Path
) -> None:
    """Optimizer, schedule, data position and figures: the second half of a run is that of the run in one piece."""
    part = tmp_path / "run"
    begin_from(run, 4, part)
    again = command(backend, base_model, part, *everything, "--resume_from_checkpoint", "latest")
    backend.train([*again, "--checkpoints_total_limit", "1"])
    assert [path.name for path in part.glob("checkpoint-*")] == ["checkpoint-6"]
    # Killed before it wrote its report: the last step is measured once more for that, and logged once.
    (part / "report.json").unlink()
    (part / "contact_sheet.png").unlink()
    backend.train(again)
    assert untimed_metrics(part) == untimed_metrics(run)
    for name, value in trained_weights(run).items():
        np.testing.assert_array_equal(trained_weights(part)[name], value, err_msg=name)
    for folder in (run, part):
        untrained, *_, last = metrics(folder)
        report = json.loads((folder / "report.json").read_text())
        assert [entry["step"] for entry in metrics(folder) if "circle_iou" in entry] == [0, 4, STEPS]
        assert report["circle_iou"] == last["circle_iou"]
        assert report["circle_iou_untrained"] == untrained["circle_iou"]
        assert report["validation_loss"] < report["validation_loss_untrained"] * 2
    assert (part / "contact_sheet.png").read_bytes() == (run / "contact_sheet.png").read_bytes()


def test_a_run_goes_on_from_what_the_full_disk_left(
    backend: Backend,
    base_model: Path,
    run: Path,
    everything: list[object],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    part = tmp_path / "run"
    begin_from(run, 2, part)
    resume = command(backend, base_model, part, *everything, "--resume_from_checkpoint", "latest")
    main = {"flax": main_of_train_flax, "torch": main_of_train_torch}[backend.name]
    assert_a_checkpoint_without_room_ends_the_run(main, [*resume, "--checkpointing_steps", "1"], part, capfd)
    backend.train(resume)
    assert untimed_metrics(part) == untimed_metrics(run)
    for name, value in trained_weights(run).items():
        np.testing.assert_array_equal(trained_weights(part)[name], value, err_msg=name)


def test_ctrl_c_saves_and_ends_the_run(backend: Backend, base_model: Path, run: Path, tmp_path: Path) -> None:
    """`test_kill_and_resume.py` has SIGTERM."""
    endless = ["--max_train_steps", 100000, "--checkpointing_steps", 10**6]
    process = backend.start(command(backend, base_model, tmp_path, *endless))
    returned, output = stop_after(process, tmp_path, 3, signal.SIGINT)
    assert returned == 130, output
    assert "--resume_from_checkpoint latest" in output
    (saved,) = tmp_path.glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert metrics(tmp_path)[-1]["step"] == step
    known = min(step, STEPS)
    assert losses(tmp_path)[:known] == losses(run)[:known]


def test_bf16_and_v_prediction_train(backend: Backend, tmp_path: Path) -> None:
    write_random_model(ONE_RESOLUTION, tmp_path / "base", prediction_type="v_prediction")
    more = ["--mixed_precision", "bf16", "--snr_gamma", 5, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2]
    backend.train(command(backend, tmp_path / "base", tmp_path / "run", *more, "--max_train_steps", 3))
    _, *entries = metrics(tmp_path / "run")
    assert all(np.isfinite(entry["loss"]) for entry in entries)
    assert [entry["learning_rate"] for entry in entries] == pytest.approx([0.0, 0.005, 0.01])
