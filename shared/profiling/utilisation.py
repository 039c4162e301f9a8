"""How much of the devices a run uses."""

import logging
import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from shared.untrusted.border import reason

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Utilisation:
    """Turns speed into model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B).

    mfu = images per second · FLOPs per image / (devices · peak of one): the share of the time that the devices would
    take at their peak for what the model needs alone.

    Attributes:
        flops_per_image: see `model_flops_per_image` of either backend, by the (width, height) of an image; may still be
            being counted.
        devices: of all hosts.
        peak_tflops: of one device, TFLOP/s; None where it is not known.
    """

    flops_per_image: Future[dict[tuple[int, int], float]]
    devices: int
    peak_tflops: float | None

    def __post_init__(self) -> None:
        self.flops_per_image.add_done_callback(_say_what_failed)

    def __call__(self, images_per_second: float, sizes: Sequence[tuple[int, int]]) -> dict[str, float]:
        """`model_tflops_per_second`, per device, and `mfu`, 0 to 1, where the peak is known.

        Neither where the FLOPs could not be counted.

        Args:
            images_per_second: of all devices together.
            sizes: of the images of each step that this is the speed of.
        """
        if self.flops_per_image.exception() is not None:
            return {}
        of_size = self.flops_per_image.result()
        flops_per_image = math.fsum(of_size[size] for size in sizes) / len(sizes) if sizes else math.nan
        achieved = images_per_second * flops_per_image / self.devices / 1e12
        known = {} if self.peak_tflops is None else {"mfu": achieved / self.peak_tflops}
        return {"model_tflops_per_second": achieved} | known


def _say_what_failed(flops_per_image: Future[dict[tuple[int, int], float]]) -> None:
    """Figures are for watching: without them the training goes on."""
    error = flops_per_image.exception()
    if error is not None:
        logger.warning(
            "The model's floating-point operations cannot be counted (%s), so model_tflops_per_second and mfu are "
            "missing; the training goes on",
            reason(error),
        )
