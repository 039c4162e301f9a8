"""How much of the devices a run uses."""

import logging
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
        flops_per_image: see `model_flops_per_image` of either backend; may still be being counted.
        devices: of all hosts.
        peak_tflops: of one device, TFLOP/s; None where it is not known.
    """

    flops_per_image: Future[float]
    devices: int
    peak_tflops: float | None

    def __post_init__(self) -> None:
        self.flops_per_image.add_done_callback(_say_what_failed)

    def __call__(self, images_per_second: float) -> dict[str, float]:
        """`model_tflops_per_second`, per device, and `mfu`, 0 to 1, where the peak is known.

        `images_per_second` is of all devices together. Neither where the FLOPs could not be counted.
        """
        if self.flops_per_image.exception() is not None:
            return {}
        achieved = images_per_second * self.flops_per_image.result() / self.devices / 1e12
        known = {} if self.peak_tflops is None else {"mfu": achieved / self.peak_tflops}
        return {"model_tflops_per_second": achieved} | known


def _say_what_failed(flops_per_image: Future[float]) -> None:
    """Figures are for watching: without them the training goes on."""
    error = flops_per_image.exception()
    if error is not None:
        logger.warning(
            "The model's floating-point operations cannot be counted (%s), so model_tflops_per_second and mfu are "
            "missing; the training goes on",
            reason(error),
        )
