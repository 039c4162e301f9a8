"""What is measured of pictures, each metric in a file of its own. `open_metrics` has them by name."""

from shared.evaluate.metrics.base import Metric
from shared.evaluate.metrics.opening import open_metrics

__all__ = ["Metric", "open_metrics"]
