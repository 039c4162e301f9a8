"""Everything that is measured on held-out samples during a run, and what is made of it at the end."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.config import TrainConfig
from shared.data.sources.base import SubsetSource
from shared.data.tokenization import PromptInputs, used_text
from shared.evaluation.convergence import convergence_step
from shared.evaluation.denoising import DenoisingEvaluation, PerSampleLosses, read_samples
from shared.evaluation.fidelity import open_fidelity
from shared.evaluation.image_grid import condition_pictures, save_contact_sheet
from shared.tracking import Tracker

SampleImages = Callable[[list[str], npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]
"""What a backend supplies: prompts and conditions uint8 [R,H,W,C] → images uint8 [R,H,W,3]."""

_ROWS_ON_SHEET = 8


class HeldOutEvaluation:
    """Measures the denoising loss and, where asked for, the conditioning fidelity; remembers what it measured."""

    def __init__(
        self,
        config: TrainConfig,
        held_out: SubsetSource,
        prompt_inputs: PromptInputs,
        batch_size: int,
        latent_shape: tuple[int, int, int],
        num_train_timesteps: int,
    ):
        """Reads the samples.

        Raises:
            UserError: too many of them are unreadable.
        """
        self._samples, self._channels = read_samples(held_out, config), config.channels_of_conditions
        self._denoising = DenoisingEvaluation(
            self._samples, prompt_inputs, config.seed, batch_size, latent_shape, num_train_timesteps
        )
        self._headings = [
            used_text(prompt_inputs.tokenize, sample.caption) for sample in self._samples[:_ROWS_ON_SHEET]
        ]
        self._fidelity = open_fidelity(config, held_out, self._samples)
        self._figures_of_step: dict[int, dict[str, float]] = {}
        self._first_images: npt.NDArray[np.uint8] | None = None
        self._last_images: npt.NDArray[np.uint8] | None = None

    @property
    def images_needed(self) -> int:
        """How many images every measurement makes."""
        return 0 if self._fidelity is None else len(self._samples)

    def run(self, step: int, per_sample_losses: PerSampleLosses, sample_images: SampleImages) -> dict[str, float]:
        """The figures of a step. The first call is to be that of the untrained ControlNet."""
        figures = self._denoising.run(per_sample_losses)
        if self._fidelity is not None:
            images = sample_images(
                [sample.caption for sample in self._samples],
                np.stack([sample.conditioning_pixels for sample in self._samples]),
            )
            figures |= self._fidelity.measure(list(images))
            self._first_images = images if self._first_images is None else self._first_images
            self._last_images = images
        self._figures_of_step[step] = figures  # measured again where a run was killed before it could report them
        return figures

    def remember(self, entries: list[dict[str, float]]) -> None:
        """Take over what a run measured before it was interrupted, from the entries of its metrics.jsonl."""
        names = self._figures_of_step[0].keys()
        for entry in entries:
            figures = {name: value for name, value in entry.items() if name in names and value is not None}
            if entry["step"] > 0 and names == figures.keys():
                self._figures_of_step[int(entry["step"])] = figures

    def report(self) -> dict[str, Any]:
        """The last figures, those of the untrained ControlNet as `…_untrained`, and the `convergence_step`."""
        untrained, last = self._figures_of_step[0], self._figures_of_step[max(self._figures_of_step)]
        report: dict[str, Any] = {}
        for name, value in last.items():
            report |= {name: value, f"{name}_untrained": untrained[name]}
        if self._fidelity is not None:
            report["convergence_step"] = convergence_step(
                [(step, figures[self._fidelity.main]) for step, figures in sorted(self._figures_of_step.items())]
            )
        return report

    def write_pictures(self, folder: Path, step: int, tracker: Tracker) -> None:
        """Save the last measurement's first images as `held_out.png`, and tell the tracker; nothing without images.

        Raises:
            OSError: the file cannot be written; the tracker has them by then.
        """
        if self._last_images is None:
            return
        tracker.images("held_out", list(zip(self._headings, self._last_images, strict=False)), step)
        self._save_sheet(folder / "held_out.png", {f"step {step}": self._last_images})

    def write_contact_sheet(self, path: Path, trained_title: str = "after training") -> bool:
        """Condition, untrained, trained and ground truth of the first samples; False where no images were made.

        Before any training there is no column of the trained.

        Raises:
            OSError: the file cannot be written.
        """
        if self._first_images is None or self._last_images is None:
            return False
        trained = {} if self._last_images is self._first_images else {trained_title: self._last_images}
        self._save_sheet(path, {"before training": self._first_images} | trained)
        return True

    def _save_sheet(self, path: Path, generated: dict[str, npt.NDArray[np.uint8]]) -> None:
        """`generated`, by title, between the first samples' conditions and, where it is at hand, ground truth."""
        drawn = [condition_pictures(sample.conditioning_pixels, self._channels) for sample in self._samples]
        columns: dict[str, Iterable[npt.NDArray[np.uint8]]] = {
            column[0][0]: [picture for _, picture in column] for column in zip(*drawn, strict=True)
        }
        columns |= generated
        truths = [sample.pixels for sample in self._samples if sample.pixels is not None]
        if truths:
            columns["ground truth"] = truths
        save_contact_sheet(path, self._headings, columns)
