"""Where a run's figures and images go: always its own metrics.jsonl, and the tracker that --report_to names."""

from shared.tracking.metrics_file import read_metrics
from shared.tracking.tracker import Tracker, check_trackers, open_trackers

__all__ = ["Tracker", "check_trackers", "open_trackers", "read_metrics"]
