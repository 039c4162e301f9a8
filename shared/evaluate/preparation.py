"""From flags to everything that an evaluation needs, checked before a model is loaded."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.checkpoints.digests import digest_of_checkpoint
from shared.config import Backend
from shared.config.public import public_values
from shared.config.support import notices
from shared.diffusion.drawing import Drawing
from shared.evaluate.metrics import Metric, open_metrics
from shared.evaluate.options import EVALUATE_FLAGS, EvaluateConfig
from shared.evaluate.output_folder import KeptMeasurement, OutputFolder
from shared.evaluate.samples import HeldOutSamples, open_samples
from shared.generate.controlnets import NamedControlNet
from shared.generate.models import NamedModels, find_models
from shared.generate.preparation import Commission, drawing_of
from shared.generate.requests import Request
from shared.models.digests import digest_of, digests_of_model
from shared.models.source import controlnet_source, shown_name
from shared.models.weight_files import DIFFUSERS
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_MOST_PICTURES = 1_000_000
# They change nothing about the pictures: where things lie, how fast it goes, what is measured afterwards, and what the
# size and the number of the pairs say anyway.
_FREE = (
    "output_dir",
    "eval_data",
    "cache_dir",
    "allowed_data_dirs",
    "max_skipped_samples",
    "controlnet_model_name_or_path",
    "pretrained_model_name_or_path",
    "num_samples",
    "resolution",
    "metrics",
    "clip_model_name_or_path",
    "inception_weights",
    "metrics_batch_size",
    "batch_size",
    "ccache",
)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is to be drawn and measured; nothing of it is on a device.

    Attributes:
        requests: a picture each; those of one pair follow each other, and `condition` is the pair's place.
        drawn_with: what decides the pictures, as JSON has it.
        kept: what was measured already, of metrics that are not asked for now too.
    """

    config: EvaluateConfig
    backend: Backend
    models: NamedModels
    drawing: Drawing
    samples: HeldOutSamples
    requests: list[Request]
    metrics: dict[str, Metric]
    folder: OutputFolder
    drawn_with: dict[str, Any]
    kept: dict[str, KeptMeasurement]

    @property
    def missing(self) -> list[Request]:
        """Those whose pictures are still to be drawn."""
        return [request for request in self.requests if not self.folder.is_drawn(request.number)]

    def commission(self, requests: list[Request]) -> Commission:
        """To draw these."""
        return Commission(self.config.generation(), self.models, self.drawing, requests)


def prepare_evaluation(config: EvaluateConfig, backend: Backend) -> Evaluation:
    """Check and open everything that can be wrong before a device is touched or a model loaded.

    Raises:
        UserError: a mistake in the flags, the models' small files, the data or what the metrics need.
    """
    for notice in notices(config, backend, EVALUATE_FLAGS):
        logger.info(notice)
    folder, generation = OutputFolder(Path(config.output_dir)), config.generation()
    models = find_models(generation)
    drawing, metrics = drawing_of(generation, models), open_metrics(config, models)
    samples = open_samples(config, models, (drawing.width, drawing.height))
    for name, metric in metrics.items():
        if len(samples) < metric.least_pairs:
            raise UserError(
                f"--metrics {name} compares sets of pictures and needs {metric.least_pairs} pairs at least, and there "
                f"are {len(samples)}: give more, or leave it out."
            )
    drawn_with = _drawn_with(config, backend, models, drawing, samples)
    return Evaluation(
        config=config,
        backend=backend,
        models=models,
        drawing=drawing,
        samples=samples,
        requests=_requests(samples, config.num_images_per_prompt),
        metrics=metrics,
        folder=folder,
        drawn_with=drawn_with,
        kept={
            name: one
            for name, one in folder.begin(drawn_with).items()
            if _is_current(metrics.get(name), one, len(samples))
        },
    )


def _is_current(metric: Metric | None, kept: KeptMeasurement, pairs: int) -> bool:
    """Of a metric that is not asked for this time, what was measured stays; what is not whole is measured again."""
    is_whole = kept.found.figures and all(len(values) == pairs for values in kept.found.of_conditions.values())
    return bool(is_whole) and (metric is None or metric.settings == kept.settings)


def _requests(samples: HeldOutSamples, images_per_prompt: int) -> list[Request]:
    if len(samples) * images_per_prompt > _MOST_PICTURES:
        raise UserError(
            f"{len(samples)} pairs with --num_images_per_prompt {images_per_prompt} are more than {_MOST_PICTURES:,} "
            "pictures: ask for fewer with --num_samples."
        )
    return [
        Request(place * images_per_prompt + copy, caption, place)
        for place, caption in enumerate(samples.captions)
        for copy in range(images_per_prompt)
    ]


def _drawn_with(
    config: EvaluateConfig, backend: Backend, models: NamedModels, drawing: Drawing, samples: HeldOutSamples
) -> dict[str, Any]:
    """Data and ControlNets by their content: they may lie elsewhere by now, or be others at the same place."""
    settings = {name: value for name, value in public_values(config, EVALUATE_FLAGS).items() if name not in _FREE}
    without = {"location"} if samples.manifest.get("fingerprint") is not None else set()
    data = {name: value for name, value in samples.manifest.items() if name not in without}
    whole = settings | {
        "backend": backend,
        "base_model": shown_name(str(models.config.pretrained_model_name_or_path)),
        "controlnets": [_digest(each) for each in models.controlnets],
        "data": data,
        "pairs": len(samples),
        "height": drawing.height,
        "width": drawing.width,
    }
    as_json: dict[str, Any] = json.loads(json.dumps(whole))
    return as_json


def _digest(controlnet: NamedControlNet) -> str | None:
    """Of its weights; None for a checkpoint that has no digests."""
    if controlnet.checkpoint is not None:
        return digest_of_checkpoint(controlnet.checkpoint)
    source = controlnet_source(controlnet.config)
    assert source is not None
    return digest_of(digests_of_model(source, DIFFUSERS))
