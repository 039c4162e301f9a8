"""What both backends do before a run and after it: steps, folders, held-out samples, what is left behind."""

import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from shared.checkpoints.policy import last_save_may_fail
from shared.config import TrainConfig
from shared.data.batches import Batch
from shared.evaluation.validation import ModelsInTraining, Validation, most_images_at_once
from shared.run import hub, result
from shared.run.folder import WEIGHTS_FILE, write_report
from shared.run.log import RunLog, StepFigures
from shared.run.result import BackendFacts, SaveWeights, complete_run
from shared.run.setup import (
    PreparedRun,
    Steps,
    abandon_later_checkpoints,
    announce,
    check_resolution,
    nothing_left_to_do,
    open_held_out_evaluation,
    open_run_tracker,
    plan_steps,
    prepare,
    total_steps,
)
from shared.tracking import Tracker, read_metrics

DEMO_MODEL = Path(__file__).resolve().parents[3] / "shared" / "demo_model"
LATENTS = (8, 8, 4)
PREPARATION_LOG = "shared.run.setup"


def config(output_dir: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": str(DEMO_MODEL),
        "generated_circles": 20,
        "resolution": 64,
        "train_batch_size": 2,
        "output_dir": str(output_dir),
        "report_to": "none",
    }
    return TrainConfig(**(settings | changes))


def prepared_at(output_dir: Path, **changes: Any) -> PreparedRun:
    return prepare(config(output_dir, **changes), "torch")


def checkpoint(output_dir: Path, step: int) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    return folder


def grey(prompts: list[str], conditions_RHWC: np.ndarray) -> np.ndarray:
    return np.full_like(conditions_RHWC, 128)


def losses(batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.ones(len(batch["timesteps"]), np.float32)


MODELS = ModelsInTraining(losses, grey)


# --- before ----------------------------------------------------------------------------------------------------------


def test_the_folder_is_there_before_the_model_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a local folder"):
        prepared_at(tmp_path / "run", pretrained_model_name_or_path=str(tmp_path / "nowhere"))
    assert (tmp_path / "run").is_dir()


def test_only_the_main_process_makes_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "prepare_repository", lambda config, folder: f"me/{folder.name}")
    settings = config(tmp_path / "run", push_to_hub=True)
    assert prepare(settings, "torch").repository == "me/run"
    assert prepare(settings, "torch", is_main_process=False).repository is None


def test_a_checkpoint_is_found_and_others_are_in_the_way(tmp_path: Path) -> None:
    newest = [checkpoint(tmp_path, step) for step in (2, 10)][-1]
    assert prepared_at(tmp_path, resume_from_checkpoint="latest").resume_from == newest
    with pytest.raises(ValueError, match="already holds checkpoints"):
        prepared_at(tmp_path)


def test_crops_are_refused_for_a_base_model_that_is_told_none(tmp_path: Path) -> None:
    assert not prepared_at(tmp_path).is_xl
    with pytest.raises(ValueError, match=r"--crops_coords_top_left_h is 3.*only Stable Diffusion XL is"):
        prepared_at(tmp_path, crops_coords_top_left_h=3)


def test_a_schedule_that_cannot_be_sampled_is_refused_where_pictures_are_asked_for(tmp_path: Path) -> None:
    model = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_karras_sigmas": True}))
    settings = {"pretrained_model_name_or_path": str(model), "num_evaluation_samples": 2}
    prepared_at(tmp_path / "run", **settings)
    picture = tmp_path / "condition.png"
    PIL.Image.new("RGB", (64, 64)).save(picture)
    asked_for: list[dict[str, Any]] = [
        {"evaluation_fidelity": "circles"},
        {"validation_image": (str(picture),), "validation_prompt": ("a circle",)},
    ]
    for flags in asked_for:
        with pytest.raises(ValueError, match="use_karras_sigmas is True, which UniPC does not support"):
            prepared_at(tmp_path / "run", **settings, **flags)


def test_xls_tokenizers_are_of_one_length(tmp_path: Path, xl_model: Path) -> None:
    """What the text encoders make of their tokens is laid side by side."""
    flags = {"pretrained_model_name_or_path": str(xl_model), "crops_coords_top_left_h": 3}
    prepared = prepared_at(tmp_path / "run", **flags)
    assert prepared.is_xl
    sizes_B6 = np.float32([[80, 90, 0, 4, 64, 64]])
    np.testing.assert_array_equal(prepared.prompt_inputs([""], sizes_B6)["time_ids"], [[64, 64, 3, 0, 64, 64]])
    own = prepared_at(tmp_path / "own", **flags | {"crops_coords_top_left_h": 0, "time_ids_from_data": True})
    np.testing.assert_array_equal(own.prompt_inputs([""], sizes_B6)["time_ids"], sizes_B6)
    changed = shutil.copytree(xl_model, tmp_path / "model")
    settings = changed / "tokenizer_2" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 60}))
    with pytest.raises(ValueError, match=r"model_max_length 77 and 60: expected the same.*tokenizer_config.json"):
        prepared_at(tmp_path / "run", pretrained_model_name_or_path=str(changed))


def test_xls_tokenizers_both_come_from_where_the_flag_says(tmp_path: Path, xl_model: Path) -> None:
    """Each of those has two letters exchanged, which shows in the text."""
    texts = ["ab"]
    flags = {"pretrained_model_name_or_path": str(xl_model)}
    before = prepared_at(tmp_path / "run", **flags).prompt_inputs(texts)
    for name in ("tokenizer", "tokenizer_2"):
        folder = shutil.copytree(xl_model / name, tmp_path / "own" / name)
        vocabulary = json.loads((folder / "vocab.json").read_text())
        first, second = ("a", "b") if name == "tokenizer" else ("b</w>", "c</w>")
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
    flags["pretrained_model_name_or_path"] = str(tmp_path / "model")
    shutil.copytree(xl_model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    after = prepared_at(tmp_path / "run", **flags, tokenizer_name=str(tmp_path / "own")).prompt_inputs(texts)
    places = {name: np.flatnonzero(before[name] != after[name]).tolist() for name in ("input_ids", "input_ids_2")}
    assert places == {"input_ids": [1], "input_ids_2": [2]}
    with pytest.raises(ValueError, match=r"is without tokenizer/tokenizer_config.json: expected, for Stable"):
        prepared_at(tmp_path / "run", **flags, tokenizer_name=str(xl_model / "tokenizer"))


@pytest.mark.parametrize("sd_unlocked", [False, True])
def test_unlocking_the_decoder_is_warned_of_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sd_unlocked: bool
) -> None:
    prepared_at(tmp_path, sd_unlocked=sd_unlocked, learning_rate=1e-5)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == sd_unlocked
    for warning in warnings:
        assert "may harm" in warning
        assert "2e-06 or lower; it is 1e-05" in warning
        assert "\n" not in warning


@pytest.mark.parametrize(("devices", "accumulation", "last"), [(1, 1, 30), (2, 1, 15), (4, 1, 8), (2, 4, 4)])
def test_epochs_become_steps(tmp_path: Path, devices: int, accumulation: int, last: int) -> None:
    """3 × 20 samples, 2 per device; the last step reaches past the end."""
    prepared = prepared_at(tmp_path, num_train_epochs=3, gradient_accumulation_steps=accumulation)
    steps = plan_steps(prepared, devices)
    assert (steps.first, steps.last, steps.epoch_size) == (0, last, 20)
    assert steps.batch.global_batch_size == 2 * devices * accumulation == steps.record["global_batch_size"]


@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 64))
def test_epochs_end_with_the_step_that_reaches_their_last_sample(epochs: int, samples: int, batch: int) -> None:
    steps, seen = 0, 0
    while seen < epochs * samples:
        steps, seen = steps + 1, seen + batch
    assert total_steps(None, epochs, samples, batch) == steps


@given(st.integers(1, 1000), st.none() | st.integers(1, 100))
def test_steps_that_are_given_win(steps: int, samples: int | None) -> None:
    assert total_steps(steps, 3, samples, 8) == steps


def test_a_stream_must_be_told_when_to_stop() -> None:
    with pytest.raises(ValueError, match="Give --max_train_steps or --max_train_samples"):
        total_steps(None, 1, None, 8)


def test_held_out_samples_are_not_of_the_epoch(tmp_path: Path) -> None:
    prepared = prepared_at(tmp_path, num_evaluation_samples=4, num_train_epochs=1)
    assert plan_steps(prepared, 1).epoch_size == 16
    assert prepared.held_out_source is not None
    assert len(prepared.held_out_source) == 4


def test_the_learning_rate_knows_of_devices_where_it_is_to(tmp_path: Path) -> None:
    prepared = prepared_at(
        tmp_path, scale_lr=True, learning_rate=1e-3, max_train_steps=5, lr_scheduler="constant", lr_warmup_steps=0
    )
    assert plan_steps(prepared, 3).learning_rate(0) == pytest.approx(1e-3 * 3 * 2)


def test_a_run_goes_on_where_its_checkpoint_stands(tmp_path: Path) -> None:
    checkpoint(tmp_path, 7)
    prepared = prepared_at(tmp_path, resume_from_checkpoint="latest", max_train_steps=9)
    assert plan_steps(prepared, 1).first == 7
    at_its_end = prepared_at(tmp_path, resume_from_checkpoint="latest", max_train_steps=7)
    assert plan_steps(at_its_end, 1).first == plan_steps(at_its_end, 1).last == 7
    before_it = prepared_at(tmp_path, resume_from_checkpoint="latest", max_train_steps=6)
    with pytest.raises(ValueError, match=r"checkpoint-7 is at step 7.*end at step 6.*--max_train_steps"):
        plan_steps(before_it, 1)


def test_a_finished_run_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint(tmp_path, 4)
    prepared = prepared_at(tmp_path, resume_from_checkpoint="latest", max_train_steps=4)
    steps = plan_steps(prepared, 1)
    with caplog.at_level(logging.INFO, PREPARATION_LOG):
        assert not nothing_left_to_do(prepared, steps)
        write_report(tmp_path, {"steps": 4})
        assert nothing_left_to_do(prepared, steps)
    assert [record.message for record in caplog.records if "nothing left to do" in record.message]


@pytest.mark.parametrize("left", ["both", "the weights", "the report"])
def test_a_finished_run_without_checkpoints_is_not_overwritten(tmp_path: Path, left: str) -> None:
    """As where there are checkpoints: the way on is said."""
    if left != "the report":
        (tmp_path / WEIGHTS_FILE).write_text("learned")
    if left != "the weights":
        write_report(tmp_path, {"steps": 4})
    with pytest.raises(ValueError, match="already holds a trained ControlNet") as refused:
        prepared_at(tmp_path)
    assert "Choose another --output_dir, or move or delete those files" in str(refused.value)
    assert (WEIGHTS_FILE in str(refused.value)) == (left != "the report")
    for path in tmp_path.iterdir():
        path.unlink()
    prepared_at(tmp_path)


def test_a_finished_run_without_checkpoints_is_done_or_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One command with `latest` is repeated until the run is done, and once more; another one is refused."""
    write_report(tmp_path, {"steps": 4})
    (tmp_path / WEIGHTS_FILE).write_text("learned")
    same = prepared_at(tmp_path, resume_from_checkpoint="latest", max_train_steps=4)
    with caplog.at_level(logging.INFO, PREPARATION_LOG):
        assert nothing_left_to_do(same, plan_steps(same, 1))
    assert "there is nothing left to do" in caplog.text
    another = prepared_at(tmp_path, resume_from_checkpoint="latest", max_train_steps=5)
    with pytest.raises(ValueError, match="already holds a trained ControlNet"):
        nothing_left_to_do(another, plan_steps(another, 1))


def test_what_a_run_left_that_had_no_room_may_be_written_again(tmp_path: Path) -> None:
    write_report(tmp_path, {"steps": 4, "not_written": ["the ControlNet"]})
    for resume in (None, "latest"):
        prepared = prepared_at(tmp_path, resume_from_checkpoint=resume, max_train_steps=4)
        assert not nothing_left_to_do(prepared, plan_steps(prepared, 1))


def test_going_back_leaves_the_later_course_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    prepared = prepared_at(tmp_path, resume_from_checkpoint="checkpoint-4", max_train_steps=9)
    with caplog.at_level(logging.WARNING, PREPARATION_LOG):
        abandon_later_checkpoints(prepared, plan_steps(prepared, 1))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"checkpoint-2", "checkpoint-4", "checkpoint-6.abandoned"} <= names
    assert "checkpoint-6" not in names
    assert "leaves at step 4" in caplog.text


@given(st.integers(1, 5000), st.sampled_from([2, 4, 8, 16, 32]))
def test_resolutions_are_what_the_vae_divides(resolution: int, factor: int) -> None:
    settings = TrainConfig(resolution=resolution)
    if resolution % factor == 0:
        check_resolution(settings, factor)
        return
    with pytest.raises(ValueError, match=f"--resolution is {resolution}") as refused:
        check_resolution(settings, factor)
    suggested = [int(word) for word in str(refused.value).rpartition("Use ")[2].rstrip(".").split(" or ")]
    assert all(value % factor == 0 and value > 0 and abs(value - resolution) < factor for value in suggested)


@pytest.mark.parametrize(("first", "kept"), [(0, []), (2, [0, 1, 2]), (9, [0, 1, 2, 3])])
def test_figures_of_steps_that_happen_again_are_dropped(tmp_path: Path, first: int, kept: list[int]) -> None:
    """A fresh run keeps nothing of what another left, not even its step 0."""
    prepared = prepared_at(tmp_path)
    tracker = open_run_tracker(prepared, 0)
    for step in range(4):
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    open_run_tracker(prepared, first).close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == kept


@pytest.mark.parametrize("done", [0, 3])
def test_the_announcement_says_what_is_about_to_happen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, done: int
) -> None:
    prepared = prepared_at(tmp_path, max_train_steps=5)
    steps = dataclasses.replace(plan_steps(prepared, 2), first=done)
    with caplog.at_level(logging.INFO, PREPARATION_LOG):
        announce("Training", prepared, steps, devices="2 × lamp", parameters=1_234_567, precision="float32")
    for part in ("Training", "2 × lamp", "1.2 M", "float32", str(tmp_path), "4 images per step"):
        assert part in caplog.text
    assert ("of which 3 are done" in caplog.text) == (done == 3)


# --- validation ------------------------------------------------------------------------------------------------------


def validation_of(prepared: PreparedRun, *, writes: bool = True, tracker: Tracker | None = None) -> Validation:
    held_out = open_held_out_evaluation(prepared, 2, LATENTS)
    return Validation(prepared.images, held_out, tracker or Tracker([]), prepared.output_dir, writes)


@pytest.mark.parametrize(("devices", "per_device", "rows"), [(2, 1, 2), (2, 100, 12), (5, 100, 15), (64, 8, 64)])
def test_held_out_rows_are_no_more_than_there_are(tmp_path: Path, devices: int, per_device: int, rows: int) -> None:
    """Three samples in four bins of timesteps, on as many devices, which take equally many."""
    prepared = prepared_at(tmp_path, num_evaluation_samples=3, train_batch_size=per_device)
    held_out = open_held_out_evaluation(prepared, devices, LATENTS)
    assert held_out is not None
    seen: list[int] = []

    def counted(batch: Batch) -> np.ndarray:
        seen.append(len(batch["timesteps"]))
        return losses(batch)

    held_out.run(0, counted, grey)
    assert set(seen) == {rows}


@pytest.fixture
def condition(tmp_path: Path) -> Path:
    path = tmp_path / "condition.png"
    PIL.Image.new("RGB", (64, 64), "white").save(path)
    return path


def with_everything(condition: Path) -> dict[str, Any]:
    return {
        "num_evaluation_samples": 3,
        "evaluation_fidelity": "circles",
        "validation_image": (str(condition),),
        "validation_prompt": ("a", "b"),
        "num_validation_images": 2,
    }


def test_a_run_that_asks_for_nothing_measures_and_draws_nothing(tmp_path: Path) -> None:
    validation = validation_of(prepared_at(tmp_path))

    def unexpected(*_: object) -> np.ndarray:
        raise AssertionError("nothing was to be computed")

    models = ModelsInTraining(unexpected, unexpected)
    validation.draw(models, 1)
    validation.measure_untrained(models, 0)
    assert validation.measure(models, 1) == {}
    assert most_images_at_once(None, None) == 0
    assert not (tmp_path / "validation").exists()


@pytest.mark.parametrize("writes", [True, False])
def test_all_processes_compute_and_one_writes(tmp_path: Path, condition: Path, writes: bool) -> None:
    prepared = prepared_at(tmp_path / "run", **with_everything(condition))
    validation = validation_of(prepared, writes=writes)
    asked: list[int] = []

    def count(prompts: list[str], conditions_RHWC: np.ndarray) -> np.ndarray:
        asked.append(len(prompts))
        return grey(prompts, conditions_RHWC)

    figures = validation.measure(ModelsInTraining(losses, count), 2)
    validation.draw(ModelsInTraining(losses, count), 2)
    assert asked == [3, 4]
    assert most_images_at_once(validation.images, validation.held_out) == 4
    assert figures["validation_loss"] == 1.0
    written = sorted(path.name for path in (prepared.output_dir / "validation").rglob("*.png"))
    assert written == (["0.png", "1.png", "held_out.png"] if writes else [])


def test_a_continued_run_finds_what_it_measured_before(tmp_path: Path) -> None:
    prepared = prepared_at(tmp_path, num_evaluation_samples=3)
    tracker = open_run_tracker(prepared, 0)
    validation = validation_of(prepared, tracker=tracker)
    validation.measure_untrained(MODELS, 0)
    tracker.log(validation.measure(ModelsInTraining(lambda batch: losses(batch) / 2, grey), 5), 5)
    tracker.close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [0, 5]

    continued = validation_of(prepared)
    continued.measure_untrained(MODELS, 5)
    assert continued.held_out is not None
    report = continued.held_out.report()
    assert report["validation_loss_untrained"] == 1.0
    assert report["validation_loss"] == 0.5


def test_a_validation_that_was_left_out_is_missing(tmp_path: Path, condition: Path) -> None:
    """Of a run that was stopped before its figures, or killed before its pictures."""
    prepared = prepared_at(tmp_path / "run", max_train_steps=10, validation_steps=4, **with_everything(condition))
    steps = plan_steps(prepared, 1)
    assert [step for step in range(11) if steps.has_validation(step)] == [0, 4, 8, 10]
    tracker = open_run_tracker(prepared, 0)
    validation = validation_of(prepared, tracker=tracker)
    tracker.log({"loss": 1.0}, 4)
    assert validation.is_missing(4)
    tracker.log(validation.measure(MODELS, 4), 4)
    assert validation.is_missing(4)
    validation.draw(MODELS, 4)
    assert not validation.is_missing(4)
    assert validation.is_missing(8)
    (prepared.output_dir / "validation" / "step-4" / "1.png").unlink()
    assert validation.is_missing(4)
    tracker.close()
    assert not validation_of(prepared_at(tmp_path / "asks for nothing")).is_missing(4)


# --- after -----------------------------------------------------------------------------------------------------------

FACTS = BackendFacts(
    "torch",
    "2 × lamp",
    ("numpy", "no-such-package"),
    samples_skipped=3,
    pairs_mismatched=2,
    peak_device_memory_gib=1.5,
)


def write_weights(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text("learned")


WEIGHTS: dict[str, SaveWeights] = {
    "the ControlNet": write_weights,
    "the UNet": lambda folder: write_weights(folder / "unet"),
}


def finish(
    prepared: PreparedRun,
    steps: Steps,
    validation: Validation,
    facts: BackendFacts = FACTS,
    weights: Mapping[str, SaveWeights] = WEIGHTS,
) -> dict[str, Any]:
    log = RunLog(
        tracker=Tracker([]),
        first_step=0,
        last_step=steps.last,
        global_batch_size=steps.batch.global_batch_size,
        epoch_size=steps.epoch_size,
        logging_steps=1,
        shows_progress=False,
    )
    for step in range(1, steps.last + 1):
        log.add(StepFigures(step, 1 / step, 0.1, 1e-3, 0.0, time.perf_counter()))
    complete_run(prepared, steps.last, log, validation, facts, time.perf_counter() - 12, weights)
    log.close()
    return json.loads((prepared.output_dir / "report.json").read_text(encoding="utf-8"))


def test_the_report_says_what_the_run_was(tmp_path: Path, condition: Path) -> None:
    prepared = prepared_at(tmp_path / "run", max_train_steps=4, **with_everything(condition))
    steps, validation = plan_steps(prepared, 2), validation_of(prepared)
    validation.measure_untrained(MODELS, 0)
    validation.measure(MODELS, 4)
    validation.draw(MODELS, 4)
    report = finish(prepared, steps, validation)
    assert report["steps"] == 4
    assert report["global_batch_size"] == 4
    assert report["images_seen"] == 16
    assert report["loss"] == 0.25
    assert report["images_per_second"] > 0
    assert report["samples_skipped"] == 3
    assert report["pairs_mismatched"] == 2
    assert report["peak_device_memory_gib"] == 1.5
    assert 0 < report["peak_host_memory_gib"] < 1000
    assert 12 <= report["seconds_total"] < 60
    assert report["validation_loss"] == report["validation_loss_untrained"] == 1.0
    assert (report["backend"], report["devices"]) == ("torch", "2 × lamp")
    assert report["versions"].keys() == {"python", "numpy"}
    assert "command" in report
    assert (prepared.output_dir / "contact_sheet.png").is_file()
    card = (prepared.output_dir / "README.md").read_text(encoding="utf-8")
    for part in ("2 × lamp", "16", "numpy", "validation/step-4/0.png"):
        assert part in card


def test_averaged_weights_are_said_to_be(tmp_path: Path) -> None:
    for use_ema in (False, True):
        prepared = prepared_at(tmp_path / str(use_ema), max_train_steps=1, use_ema=use_ema)
        report = finish(prepared, plan_steps(prepared, 1), validation_of(prepared))
        assert (report.get("weights") == "moving average") is use_ema
        assert ("- Weights: their moving average" in (prepared.output_dir / "README.md").read_text()) is use_ema


def test_without_held_out_samples_there_is_no_contact_sheet(tmp_path: Path) -> None:
    prepared = prepared_at(tmp_path, max_train_steps=1)
    report = finish(prepared, plan_steps(prepared, 1), validation_of(prepared))
    assert "validation_loss" not in report
    assert not (tmp_path / "contact_sheet.png").exists()


def test_a_device_without_a_count_of_its_memory(tmp_path: Path) -> None:
    prepared = prepared_at(tmp_path, max_train_steps=1)
    facts = dataclasses.replace(FACTS, peak_device_memory_gib=None)
    assert finish(prepared, plan_steps(prepared, 1), validation_of(prepared), facts)["peak_device_memory_gib"] is None


def test_what_is_uploaded_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "prepare_repository", lambda *_: "me/circles")
    uploaded: list[set[str]] = []

    def push(config: TrainConfig, folder: Path, repository: str) -> str:
        assert repository == "me/circles"
        uploaded.append({path.name for path in folder.iterdir()})
        return "https://example.invalid/me/circles"

    monkeypatch.setattr(hub, "push", push)
    prepared = prepared_at(tmp_path, max_train_steps=1, push_to_hub=True)
    finish(prepared, plan_steps(prepared, 1), validation_of(prepared))
    (names,) = uploaded
    assert {"report.json", "README.md"} <= names
    assert "me/circles" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert nothing_left_to_do(prepared, plan_steps(prepared, 1))
    assert len(uploaded) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.pop("uploaded") == "https://example.invalid/me/circles"
    write_report(tmp_path, report)  # as left by a run that was killed while it uploaded
    assert nothing_left_to_do(prepared, plan_steps(prepared, 1))
    assert len(uploaded) == 2


@pytest.mark.parametrize("killed_at", ["the ControlNet", "the UNet", "README.md"])
def test_a_run_that_is_killed_before_all_is_written_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    """The next start then writes what is missing."""

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    prepared = prepared_at(tmp_path, max_train_steps=1)
    if killed_at == "README.md":
        monkeypatch.setattr(result, "write_model_card", kill)
    weights = {name: kill if name == killed_at else save for name, save in WEIGHTS.items()}
    with pytest.raises(Killed):
        finish(prepared, plan_steps(prepared, 1), validation_of(prepared), weights=weights)
    assert not nothing_left_to_do(prepared, plan_steps(prepared, 1))


# --- a disk that is full at the end ----------------------------------------------------------------------------------


@pytest.fixture
def ready(tmp_path: Path) -> tuple[PreparedRun, Steps, Validation]:
    prepared = prepared_at(tmp_path / "run", max_train_steps=2)
    return prepared, plan_steps(prepared, 1), validation_of(prepared)


@pytest.mark.parametrize("kind", [OSError, SafetensorError, ValueError])
def test_weights_without_room_are_put_where_there_is_some(
    ready: tuple[PreparedRun, Steps, Validation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    prepared, steps, validation = ready
    checkpoint(prepared.output_dir, 1)
    spare = Path("/dev/shm")  # another file system than that of the test's folder
    if spare.stat().st_dev == tmp_path.stat().st_dev:
        spare = tmp_path
        monkeypatch.setattr(result, "_is_another_file_system", lambda *_: True)
    monkeypatch.setattr(tempfile, "tempdir", str(spare))

    def write(folder: Path) -> None:
        if folder.is_relative_to(prepared.output_dir):
            raise kind(errno.ENOSPC, "No space left on device") if kind is OSError else kind("No space left on device")
        write_weights(folder)

    with pytest.raises(ValueError, match="The training is finished") as error:
        finish(prepared, steps, validation, weights={"the ControlNet": write, "the UNet": WEIGHTS["the UNet"]})
    message = str(error.value)
    found = re.search(r"the ControlNet is in (\S+);", message)
    assert found is not None
    assert (Path(found[1]) / "weights").read_text() == "learned"
    assert Path(found[1]).is_relative_to(spare)
    shutil.rmtree(found[1])
    assert "No space left on device" in message
    assert f"the UNet is in {prepared.output_dir}" in message
    assert "last complete checkpoint there is checkpoint-1" in message
    assert "missing;" not in message
    report = json.loads((prepared.output_dir / "report.json").read_text())
    assert report["not_written"] == ["the ControlNet"]
    assert (prepared.output_dir / "README.md").is_file()


def test_a_disk_without_any_room_is_told_with_what_is_missing(
    ready: tuple[PreparedRun, Steps, Validation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, steps, validation = ready

    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="The training is finished") as error:
        finish(prepared, steps, validation)
    message = str(error.value)
    assert "the ControlNet, the UNet, README.md, report.json missing" in message
    assert "checkpoint there is none" in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("failing", ["report.json", "README.md"])
def test_one_file_that_cannot_be_written_keeps_no_other_from_it(
    ready: tuple[PreparedRun, Steps, Validation], monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    prepared, steps, validation = ready
    (prepared.output_dir / failing).mkdir()
    (prepared.output_dir / failing / "in the way").touch()
    with pytest.raises(ValueError, match="The training is finished") as error:
        finish(prepared, steps, validation)
    assert f"{failing} missing" in str(error.value)
    for name in {"weights", "unet/weights", "report.json", "README.md"} - {failing}:
        assert (prepared.output_dir / name).is_file(), name


def test_pictures_that_cannot_be_written_cost_a_warning_of_each_kind(
    tmp_path: Path, condition: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = prepared_at(tmp_path / "run", max_train_steps=4, **with_everything(condition))
    (prepared.output_dir / "validation").write_text("in the way")
    (prepared.output_dir / "contact_sheet.png").mkdir()
    steps, validation = plan_steps(prepared, 2), validation_of(prepared)
    for step in (0, 2, 4):
        assert validation.measure(MODELS, step)["validation_loss"] == 1.0
        validation.draw(MODELS, step)
    assert finish(prepared, steps, validation)["steps"] == 4
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [warning.partition(" cannot")[0] for warning in warnings] == [
        "Pictures of held-out samples",
        "The contact sheet's pictures",
        "Validation images",
    ]


@pytest.mark.parametrize("finished", [True, False])
def test_the_last_checkpoint_costs_no_result(finished: bool, caplog: pytest.LogCaptureFixture) -> None:
    def save() -> None:
        with last_save_may_fail(finished):
            raise ValueError("A checkpoint could not be written.")

    if finished:
        save()
        assert "A checkpoint could not be written." in caplog.text
    else:
        with pytest.raises(ValueError, match="could not be written"):
            save()
