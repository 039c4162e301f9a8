"""What happens every `--validation_steps`: validation images, and the figures on held-out samples."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from shared.evaluation.denoising import PerSampleLosses
from shared.evaluation.held_out import HeldOutEvaluation, SampleImages
from shared.evaluation.validation_images import ValidationImages
from shared.tracking import Tracker, read_metrics

logger = logging.getLogger(__name__)

_CONTACT_SHEET = "contact_sheet.png"


class ModelsInTraining(NamedTuple):
    """What a backend can do with the models as they are at this moment."""

    per_sample_losses: PerSampleLosses
    sample_images: SampleImages


class DiskErrors:
    """What only shows a training may fail without ending it."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    @contextmanager
    def warn_once(self, pictures: str) -> Iterator[None]:
        """Around the writing of pictures, named in the plural: an OSError is a warning, the first time."""
        try:
            yield
        except OSError as error:
            if pictures not in self._warned:
                logger.warning(
                    "%s cannot be written (%s) and are missing as long as that lasts; the training goes on",
                    *(pictures, error.strerror or error),
                )
            self._warned.add(pictures)


@dataclass(frozen=True)
class Validation:
    """Whatever of it a run asks for.

    Several processes all call it, since all have a part in computing; only the one with `writes` leaves files.
    """

    images: ValidationImages | None
    held_out: HeldOutEvaluation | None
    tracker: Tracker
    output_dir: Path
    writes: bool = True
    disk_errors: DiskErrors = field(default_factory=DiskErrors)

    def draw(self, models: ModelsInTraining, step: int) -> None:
        """Make and write the validation images."""
        if self.images is None:
            return
        images_RHWC = models.sample_images(self.images.prompts, self.images.conditions_RHWN)
        if self.writes:
            with self.disk_errors.warn_once("Validation images"):
                folder = self.images.write(images_RHWC, step, self.tracker)
                logger.info("Validation images of step %d are in %s", step, folder)

    def measure(self, models: ModelsInTraining, step: int) -> dict[str, float]:
        """The figures on the held-out samples; none where none are held out. The contact sheet is drawn anew."""
        if self.held_out is None:
            return {}
        figures = self.held_out.run(step, models.per_sample_losses, models.sample_images)
        if self.writes:
            with self.disk_errors.warn_once("Pictures of held-out samples"):
                self.held_out.write_pictures(self.output_dir / "validation" / f"step-{step}", step, self.tracker)
            self._draw_contact_sheet(self.held_out, f"after {step} steps")
        return figures

    def finish_contact_sheet(self) -> None:
        """Draw it with the last measurement as what training came to."""
        if self.held_out is not None and self._draw_contact_sheet(self.held_out, "after training"):
            path = self.output_dir / _CONTACT_SHEET
            logger.info("Condition, before, after and ground truth are side by side in %s", path)

    def is_missing(self, step: int) -> bool:
        """Whether a run that was stopped or killed after that step has left out its validation, or a part of it."""
        if self.images is not None and not self.images.are_drawn(step):
            return True
        logged = (entry for entry in read_metrics(self.output_dir) if entry["step"] == step)
        return self.held_out is not None and not any("validation_loss" in entry for entry in logged)

    def measure_again(self, models: ModelsInTraining, step: int) -> None:
        """The figures of a step that a run resumed at, for its report; logged where the log lacks them."""
        figures = self.measure(models, step)
        logged = [entry for entry in read_metrics(self.output_dir) if entry["step"] == step]
        if figures and not any(figures.keys() <= entry.keys() for entry in logged):
            self.tracker.log(figures, step)

    def measure_untrained(self, models: ModelsInTraining, first_step: int) -> None:
        """What the run starts from: logged by a fresh run, and found again by a continued one for its report."""
        if self.held_out is None:
            return
        if first_step == 0:
            self.tracker.log(self.measure(models, 0), 0)
            if self.writes and self.held_out.images_needed:
                path = self.output_dir / _CONTACT_SHEET
                logger.info("Watch it learn: %s is drawn anew at every validation", path)
        else:
            self.held_out.run(0, models.per_sample_losses, models.sample_images)
            self.held_out.remember(read_metrics(self.output_dir))

    def _draw_contact_sheet(self, held_out: HeldOutEvaluation, trained_title: str) -> bool:
        """Whether there is one now."""
        with self.disk_errors.warn_once("The contact sheet's pictures"):
            return held_out.write_contact_sheet(self.output_dir / _CONTACT_SHEET, trained_title)
        return False


def most_images_at_once(images: ValidationImages | None, held_out: HeldOutEvaluation | None) -> int:
    """How many images the largest of a validation's requests asks for; 0 where none are ever made."""
    return max(0 if images is None else len(images.prompts), 0 if held_out is None else held_out.images_needed)
