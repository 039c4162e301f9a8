"""From the names of metrics to what measures."""

from shared.evaluate.metrics.base import Metric
from shared.evaluate.metrics.clip_score import ClipScore
from shared.evaluate.metrics.colours import open_colours
from shared.evaluate.metrics.edges import open_edges
from shared.evaluate.metrics.fid import Fid
from shared.evaluate.options import EvaluateConfig, MetricName
from shared.generate.models import NamedModels


def open_metrics(config: EvaluateConfig, models: NamedModels) -> dict[str, Metric]:
    """Those that the flags ask for, in their order. No model of one is loaded yet.

    Raises:
        UserError: one lacks a package or a model's files, or does not fit the conditions.
    """
    return {name: _open(name, config, models) for name in config.metrics or ()}


def _open(name: MetricName, config: EvaluateConfig, models: NamedModels) -> Metric:
    match name:
        case "edges":
            return open_edges(models)
        case "colours":
            return open_colours(models)
        case "clip_score":
            return ClipScore(config)
        case "fid":
            return Fid(config)
