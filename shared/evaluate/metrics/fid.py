"""Do the pictures look like the held-out ones? Fréchet and kernel distance of Inception's features (FID and KID)."""

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.evaluate.metrics.base import Figure, Measured, Measurement, Pixels, in_parts
from shared.evaluate.metrics.in_torch import check_torch
from shared.evaluate.options import EvaluateConfig
from shared.evaluation.frechet_distance import frechet_distance
from shared.evaluation.kernel_distance import LEAST_PAIRS, kernel_distance
from shared.untrusted import open_file, sha256_from, shown
from shared.user_errors import UserError

Features = Callable[[Sequence[Pixels]], npt.NDArray[np.float32]]
"""Pictures → [B,D]."""

_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
_PUBLISHED = "6726825d"  # how the digest of that file begins: its name says so
_FEATURES = 2048
_ENOUGH = 10_000  # what the authors of FID ask for


class Fid:
    """See `Metric`."""

    least_pairs = LEAST_PAIRS

    def __init__(self, config: EvaluateConfig) -> None:
        """Reads the weights.

        Raises:
            UserError: PyTorch is missing, or the weights, or they cannot be read.
        """
        check_torch("fid")
        if config.inception_weights is None:
            raise UserError(
                "--metrics fid needs --inception_weights, the file with TensorFlow's Inception of 2015 in PyTorch's "
                f"names. Run: wget {_URL}"
            )
        path = Path(config.inception_weights)
        if not os.path.lexists(path):
            raise UserError(f"--inception_weights: there is no file {shown(path)}. Run: wget {_URL}")
        with open_file(path) as file:
            self._digest = sha256_from(file.fileno())
        self._features: Features = importlib.import_module("torch_trainer.picture_models.inception").load_features(path)
        self._at_once = config.metrics_batch_size
        self.settings = {"inception_weights": self._digest, "resizing": "bicubic, antialiased, as clean-fid's"}

    def measure(self, measured: Iterable[Measured]) -> Measurement:
        """See `Metric`. Everything but KID's error treats several pictures of a pair as independent ones."""
        truths, drawn = [], []
        for part in in_parts(measured, self._at_once):
            truths.append(self._features([one.truth_HWC for one in part]))
            pictures = [picture for one in part for picture in one.pictures_HWC]
            parts = [
                self._features(pictures[start : start + self._at_once])
                for start in range(0, len(pictures), self._at_once)
            ]
            drawn.append(np.concatenate(parts).reshape(len(part), -1, truths[0].shape[-1]))
        truths_ND, drawn_NSD = np.concatenate(truths), np.concatenate(drawn)
        pairs, copies, features = drawn_NSD.shape
        count = pairs * copies
        fid = frechet_distance(truths_ND, drawn_NSD.reshape(count, features))
        kid = kernel_distance(truths_ND, drawn_NSD)
        return Measurement(
            {
                "fid": Figure(fid, None, pairs, count, "lower", " ".join(filter(None, (self._origin, _bias(pairs))))),
                "kid": Figure(kid.value, kid.standard_error, pairs, count, "lower", self._origin),
            },
            {},
        )

    @property
    def _origin(self) -> str:
        if self._digest.startswith(_PUBLISHED):
            return ""
        return "The weights are not those that figures are published with: it cannot be compared with any."


def _bias(pairs: int) -> str:
    if pairs >= _ENOUGH:
        return ""
    fewer = f", and {pairs:,} pairs do not even determine the covariance of {_FEATURES:,} features"
    return (
        f"Biased upwards by the small number of pairs{fewer if pairs <= _FEATURES else ''}: compare it only with that "
        "of as many."
    )
