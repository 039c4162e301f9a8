"""The pictures that `--validation_image` and `--validation_prompt` ask for."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shared.config import TrainConfig
from shared.data.conditions import in_turn
from shared.data.decoded_pairs import conditioning_interpolation
from shared.data.preprocessing import preprocess
from shared.data.sample import BadSampleError
from shared.data.tokenization import Tokenize, used_text
from shared.evaluation.image_grid import GridRow, condition_pictures, save_grid
from shared.tracking import Tracker
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_FOLDER = "validation"


class ValidationImages:
    """The (condition, prompt) pairs of a run, one going with all of the other, and where their pictures go.

    Attributes:
        prompts: one for each image to make: each pair's `num_validation_images` times.
        conditions_RHWN: uint8 [R,H,W,N], the conditions of each side by side, of the configuration's channels.
    """

    def __init__(self, config: TrainConfig):
        """Reads the condition images.

        Raises:
            UserError: one does not exist or cannot be read.
        """
        images, prompts = config.validation_image or (), config.validation_prompt or ()
        self._channels = config.channels_of_conditions
        groups = in_turn(images, len(self._channels))
        groups = groups * len(prompts) if len(groups) == 1 else groups
        self._pair_prompts = prompts_of_pairs(config)
        self._pair_conditions = [_read_conditions(group, config) for group in groups]
        self._per_pair = config.num_validation_images
        self._folder = Path(config.output_dir) / _FOLDER
        self.prompts = [prompt for prompt in self._pair_prompts for _ in range(self._per_pair)]
        self._headings: list[str] = list(self._pair_prompts)
        self.conditions_RHWN = np.repeat(np.array(self._pair_conditions), self._per_pair, axis=0)

    def show_used_text(self, tokenize: Tokenize) -> None:
        """From here on, show of each prompt what its tokens hold, and say in the log where that is not all of it."""
        self._headings = [used_text(tokenize, prompt) for prompt in self._pair_prompts]
        for prompt, heading in dict(zip(self._pair_prompts, self._headings, strict=True)).items():
            if prompt != heading:
                logger.warning("--validation_prompt: of %r only this is used: %r", shown(prompt), shown(heading))

    def write(self, images_RHWC: np.ndarray, step: int, tracker: Tracker) -> Path:
        """Save `validation/step-N/PAIR.png`, condition beside images, and tell the tracker; returns the folder.

        Raises:
            OSError: a file cannot be written; the tracker has them all by then.
        """
        folder = self._folder / f"step-{step}"
        rows = []
        for pair, (heading, condition) in enumerate(zip(self._headings, self._pair_conditions, strict=True)):
            own = images_RHWC[pair * self._per_pair : (pair + 1) * self._per_pair]
            captioned = [
                *condition_pictures(condition, self._channels),
                *((f"image {index}", image) for index, image in enumerate(own)),
            ]
            tracker.images(f"validation/{pair}", captioned, step)
            rows.append(GridRow(heading, captioned))
        for pair, row in enumerate(rows):
            save_grid(folder / f"{pair}.png", [row])
        return folder

    def are_drawn(self, step: int) -> bool:
        """Whether all pictures of that step are there."""
        return len(self.pictures(step)) == len(self._headings)

    def pictures(self, step: int) -> list[tuple[Path, str]]:
        """What `write` saved at a step: each file with what was used of its prompt."""
        return saved_pictures(self._folder.parent, step, self._headings)


def saved_pictures(output_dir: Path, step: int, prompts: Sequence[str]) -> list[tuple[Path, str]]:
    """Those of a run's folder that were saved at a step, each with the prompt of its pair."""
    folder = output_dir / _FOLDER / f"step-{step}"
    pictures = [(folder / f"{pair}.png", prompt) for pair, prompt in enumerate(prompts)]
    return [(path, prompt) for path, prompt in pictures if path.is_file()]


def prompts_of_pairs(config: TrainConfig) -> tuple[str, ...]:
    """One for each pair of `--validation_prompt` and `--validation_image`."""
    images, prompts = config.validation_image or (), config.validation_prompt or ()
    return prompts * (len(images) // config.num_conditions) if len(prompts) == 1 else prompts


def _read_conditions(paths: Sequence[str], config: TrainConfig) -> np.ndarray:
    """uint8 [H,W,N]: one picture of each condition."""
    channels = config.channels_of_conditions
    parts = [_read_condition(Path(path), config, count) for path, count in zip(paths, channels, strict=True)]
    return np.concatenate(parts, axis=-1)


def _read_condition(path: Path, config: TrainConfig, channels: int) -> np.ndarray:
    if not os.path.exists(path):
        raise UserError(f"--validation_image: there is no file {shown(path)}. Give paths of existing images.")
    try:
        return preprocess(path, config.resolution, conditioning_interpolation(config), channels)
    except BadSampleError as error:
        raise UserError(f"--validation_image {shown(path)} cannot be used: {error}. Give a readable image.") from error
