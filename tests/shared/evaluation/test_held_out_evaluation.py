"""Figures on held-out samples, from a backend that draws what it is told to."""

import dataclasses
import importlib.util
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from shared.config import TrainConfig, validate
from shared.data.batches import Batch
from shared.data.sample import RawSample
from shared.data.sources import SubsetSource, open_sources
from shared.data.sources.circles import CirclesSource, draw
from shared.data.tokenization import PromptInputs
from shared.evaluation import edges
from shared.evaluation.denoising import read_samples
from shared.evaluation.fidelity import check_fidelity, open_fidelity
from shared.evaluation.held_out import HeldOutEvaluation
from shared.evaluation.validation import ModelsInTraining, Validation
from shared.tracking import Tracker

CONFIG = TrainConfig(
    pretrained_model_name_or_path="base",
    generated_circles=40,
    resolution=64,
    num_evaluation_samples=5,
    evaluation_fidelity="circles",
)
LATENTS = (8, 8, 4)


def evaluation(config: TrainConfig = CONFIG) -> HeldOutEvaluation:
    _, held_out = open_sources(config)
    assert held_out is not None
    return HeldOutEvaluation(config, held_out, PromptInputs(tokenize), 3, LATENTS, 1000)


def tokenize(captions: Sequence[str]) -> np.ndarray:
    return np.zeros((len(captions), 77), np.int32)


def losses(batch: Batch) -> np.ndarray:
    """A loss that is its timestep: bins have known ranges."""
    return batch["timesteps"].astype(np.float32)


def grey(prompts: list[str], conditions: np.ndarray) -> np.ndarray:
    return np.full_like(conditions, 128)


def truth(config: TrainConfig) -> np.ndarray:
    _, held_out = open_sources(config)
    assert held_out is not None
    return np.stack([np.asarray(held_out[index].image) for index in range(len(held_out))])


def test_an_untrained_and_a_perfect_model_are_told_apart(tmp_path: Path) -> None:
    measured = evaluation()
    asked: list[str] = []

    def perfect(prompts: list[str], conditions: np.ndarray) -> np.ndarray:
        asked.extend(prompts)
        return truth(CONFIG)

    assert measured.run(0, losses, grey)["circle_iou"] == 0.0
    for step in (10, 20, 30):
        figures = measured.run(step, losses, perfect)
    assert figures["circle_iou"] > 0.99
    assert figures["color_accuracy"] == 1.0
    assert 0 <= figures["validation_loss_t000-249"] < 250 <= figures["validation_loss_t250-499"] < 500
    assert all(prompt.endswith("background") for prompt in asked)
    report = measured.report()
    assert report["circle_iou"] == figures["circle_iou"]
    assert report["circle_iou_untrained"] == 0.0
    assert report["convergence_step"] == 10
    assert measured.write_contact_sheet(tmp_path / "sheet.png")
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 64


def test_a_continued_run_remembers_what_it_measured_before() -> None:
    entries = [{"step": 0, "loss": 1.0}]
    first = evaluation()
    for step in (0, 10, 20):
        images = grey if step < 20 else (lambda prompts, conditions: truth(CONFIG))
        entries.append({"step": step} | first.run(step, losses, images))
    continued = evaluation()
    continued.run(0, losses, grey)
    continued.remember(entries)
    for step in (30, 40):
        for measured in (first, continued):
            measured.run(step, losses, lambda prompts, conditions: truth(CONFIG))
    assert continued.report() == first.report()
    assert continued.report()["convergence_step"] == 20


def test_without_a_fidelity_no_image_is_made(tmp_path: Path) -> None:
    def never(prompts: list[str], conditions: np.ndarray) -> np.ndarray:
        raise AssertionError("images were asked for")

    measured = evaluation(dataclasses.replace(CONFIG, evaluation_fidelity="none"))
    assert set(measured.run(0, losses, never)) == {
        "validation_loss",
        *(f"validation_loss_t{first:03}-{first + 249:03}" for first in range(0, 1000, 250)),
    }
    assert "convergence_step" not in measured.report()
    assert not measured.write_contact_sheet(tmp_path / "sheet.png")


def test_edges_of_the_conditions_are_measured() -> None:
    measured = evaluation(dataclasses.replace(CONFIG, evaluation_fidelity="edges"))
    figures = measured.run(0, losses, lambda prompts, conditions: truth(CONFIG))
    assert 0 < figures["edge_f1"] <= 1
    assert measured.run(1, losses, grey)["edge_recall"] == 0.0


def with_corrupt(held_out: SubsetSource, *places: int) -> SubsetSource:
    """The same samples in the same places, some of which cannot be read."""

    class Corrupt(SubsetSource):
        def __getitem__(self, index: int) -> RawSample:
            sample = super().__getitem__(index)
            return dataclasses.replace(sample, image=b"cut off") if index in places else sample

    return Corrupt(CirclesSource(40, CONFIG.resolution, CONFIG.seed), held_out.indices, {})


@pytest.mark.parametrize("places", [(0,), (2,), (4,), (1, 3)])
def test_a_picture_is_measured_against_its_own_truth_where_samples_cannot_be_read(places: tuple[int, ...]) -> None:
    _, held_out = open_sources(CONFIG)
    assert held_out is not None
    usable = [index for index in range(5) if index not in places]
    config = dataclasses.replace(CONFIG, max_skipped_samples=2)
    measured = HeldOutEvaluation(config, with_corrupt(held_out, *places), PromptInputs(tokenize), 3, LATENTS, 1000)
    captions = [draw(int(held_out.indices[index]), CONFIG.resolution, CONFIG.seed).truth.caption for index in usable]
    asked: list[str] = []

    def perfect(prompts: list[str], conditions: np.ndarray) -> np.ndarray:
        asked[:] = prompts
        for condition, index in zip(conditions, usable, strict=True):
            np.testing.assert_array_equal(condition, np.asarray(held_out[index].conditioning_images[0]))
        return truth(CONFIG)[usable]

    assert measured.images_needed == len(usable)
    assert measured.run(0, losses, lambda prompts, conditions: perfect(prompts, conditions)[::-1])["circle_iou"] < 0.9
    figures = measured.run(1, losses, perfect)
    assert asked == captions
    assert figures["circle_iou"] > 0.99
    assert figures["color_accuracy"] == 1.0


def test_edges_are_those_of_the_samples_that_can_be_read() -> None:
    _, held_out = open_sources(CONFIG)
    assert held_out is not None
    config = dataclasses.replace(CONFIG, evaluation_fidelity="edges", max_skipped_samples=1)
    samples = read_samples(with_corrupt(held_out, 1), config)
    fidelity = open_fidelity(config, held_out, samples)
    assert fidelity is not None
    pictures = list(truth(CONFIG)[[0, 2, 3, 4]])
    expected = [
        edges.measure(np.asarray(held_out[index].conditioning_images[0]), [truth(CONFIG)[index]])
        for index in (0, 2, 3, 4)
    ]
    assert fidelity.measure(pictures) == edges.summarise(expected)


def test_without_fidelity_no_image_is_needed() -> None:
    assert evaluation(dataclasses.replace(CONFIG, evaluation_fidelity="none")).images_needed == 0
    assert evaluation().images_needed == 5


def test_edges_need_opencv_and_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = dataclasses.replace(CONFIG, evaluation_fidelity="edges")
    check_fidelity(wanted)
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "cv2" else found(name))
    with pytest.raises(ValueError, match=r"--evaluation_fidelity edges needs OpenCV.*pip install opencv-python"):
        check_fidelity(wanted)
    check_fidelity(CONFIG)
    check_fidelity(dataclasses.replace(CONFIG, evaluation_fidelity="none"))


def test_flags_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="--num_evaluation_samples"):
        validate(dataclasses.replace(CONFIG, num_evaluation_samples=0), "flax")
    with pytest.raises(ValueError, match="needs --generated_circles"):
        validate(dataclasses.replace(CONFIG, generated_circles=None, dataset_name="some/circles"), "flax")


def test_the_contact_sheet_is_there_before_training_and_drawn_anew_at_every_validation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sheet = tmp_path / "contact_sheet.png"
    validation = Validation(None, evaluation(), Tracker([]), tmp_path)
    validation.measure_untrained(ModelsInTraining(losses, grey), 0)
    assert str(sheet) in caplog.text
    drawn = [sheet.read_bytes()]
    for step in (10, 20):
        validation.measure(ModelsInTraining(losses, lambda prompts, conditions: truth(CONFIG)), step)
        drawn.append(sheet.read_bytes())
    validation.finish_contact_sheet()
    drawn.append(sheet.read_bytes())
    assert len(set(drawn)) == 4
    with PIL.Image.open(tmp_path / "contact_sheet.png") as last, PIL.Image.open(io.BytesIO(drawn[0])) as first:
        assert last.width > first.width  # a column more
    assert list(tmp_path.glob(".*")) == []


def test_only_the_process_that_writes_draws_the_contact_sheet(tmp_path: Path) -> None:
    validation = Validation(None, evaluation(), Tracker([]), tmp_path, writes=False)
    validation.measure_untrained(ModelsInTraining(losses, grey), 0)
    validation.measure(ModelsInTraining(losses, grey), 10)
    assert list(tmp_path.iterdir()) == []
