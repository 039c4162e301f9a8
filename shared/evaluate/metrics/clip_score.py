"""Do pictures follow their captions? CLIP's cosine similarity of both.

Reference: Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", as torchmetrics'
CLIPScore and the figures of ControlNet++ have it: 100 times the cosine, without the paper's factor 2.5.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from shared.evaluate.metrics.base import Measured, Measurement, Pixels, in_parts, means
from shared.evaluate.metrics.in_torch import check_torch
from shared.evaluate.options import EvaluateConfig
from shared.models.source import ModelSource
from shared.models.weight_files import TRANSFORMERS, safetensors_files

Scores = Callable[[Sequence[Pixels], Sequence[str]], list[float]]
"""Pictures and a caption for each → 100 × the cosine of their embeddings."""


class ClipScore:
    """See `Metric`."""

    least_pairs = 1

    def __init__(self, config: EvaluateConfig) -> None:
        """Raises UserError where PyTorch or the model's files are missing; loads nothing."""
        check_torch("clip_score", "transformers")
        self._name, self._cache_dir = config.clip_model_name_or_path, config.cache_dir
        self._at_once = config.metrics_batch_size
        source = ModelSource(self._name, cache_dir=self._cache_dir)
        safetensors_files(source.folder(TRANSFORMERS), TRANSFORMERS)
        self.settings = {"clip_model": source.name}

    def measure(self, measured: Iterable[Measured]) -> Measurement:
        """See `Metric`. A condition's score is the mean over its pictures."""
        clip = importlib.import_module("torch_trainer.picture_models.clip")
        scores: Scores = clip.load_scores(self._name, self._cache_dir)
        rows, pictures = [], 0
        for part in in_parts(measured, self._at_once):
            drawn = [picture for one in part for picture in one.pictures_HWC]
            captions = [one.caption for one in part for _ in one.pictures_HWC]
            of_pictures = [
                score
                for start in range(0, len(drawn), self._at_once)
                for score in scores(drawn[start : start + self._at_once], captions[start : start + self._at_once])
            ]
            pictures += len(drawn)
            rows += [{"clip_score": float(np.mean(row))} for row in np.reshape(of_pictures, (len(part), -1))]
        return means(rows, "higher", pictures)
