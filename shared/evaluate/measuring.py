"""From pictures to figures: every metric once, each kept when it is done."""

import logging
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from shared.config.public import public_values
from shared.evaluate.metrics.base import Measured
from shared.evaluate.options import EVALUATE_FLAGS
from shared.evaluate.output_folder import KeptMeasurement
from shared.evaluate.preparation import Evaluation
from shared.run.result import package_versions

logger = logging.getLogger(__name__)

_PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers", "opencv-python-headless", "numpy", "pillow")


def measure(evaluation: Evaluation) -> dict[str, KeptMeasurement]:
    """All metrics that are asked for, in their order. Those that were measured before are not measured again.

    Raises:
        UserError: a picture cannot be read any more, or a model cannot be loaded.
    """
    kept = dict(evaluation.kept)
    for name, metric in evaluation.metrics.items():
        if name in kept:
            logger.info("%s is measured already", name)
            continue
        with logging_redirect_tqdm():
            pairs = tqdm(_measured(evaluation), name, len(evaluation.samples), unit="pair", dynamic_ncols=True)
            kept[name] = KeptMeasurement(metric.settings, metric.measure(pairs))
        write_record(evaluation, kept)
    return {name: kept[name] for name in evaluation.metrics}


def write_record(evaluation: Evaluation, kept: dict[str, KeptMeasurement]) -> None:
    """`evaluation.json` with what is known by now. UserError where it cannot be written."""
    asked = [name for name in evaluation.metrics if name not in kept]
    record: dict[str, Any] = {
        "finished": not asked,
        "backend": evaluation.backend,
        "settings": public_values(evaluation.config, EVALUATE_FLAGS),
        "drawn_with": evaluation.drawn_with,
        "versions": package_versions(_PACKAGES),
        "pairs": len(evaluation.samples),
        "pairs_skipped": evaluation.samples.skipped,
        "pictures": len(evaluation.requests),
        "not_measured": {name: _why_not(name, asked) for name in EVALUATE_FLAGS["metrics"].choices if name not in kept},
    }
    evaluation.folder.write(record, kept)


def pictures_of(evaluation: Evaluation, place: int) -> Measured:
    """A pair with its pictures."""
    pair, drawing, copies = evaluation.samples[place], evaluation.drawing, evaluation.config.num_images_per_prompt
    numbers = range(place * copies, (place + 1) * copies)
    pictures = [evaluation.folder.read_picture(number, drawing.height, drawing.width) for number in numbers]
    return Measured(*pair, pictures)


def _measured(evaluation: Evaluation) -> Iterator[Measured]:
    return (pictures_of(evaluation, place) for place in range(len(evaluation.samples)))


def _why_not(name: str, asked: list[str]) -> str:
    return "not measured yet: the same command goes on" if name in asked else "not asked for (--metrics)"
