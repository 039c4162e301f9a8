"""The verdict in a few lines of text."""

from shared.compare.comparability import setting_differences
from shared.compare.comparison import Comparison
from shared.compare.verdict import CONTROLNET_TOLERANCE, LOSS_TOLERANCE
from shared.untrusted import shown

_MOST_SETTINGS = 6


def summary(comparison: Comparison) -> str:
    """What agrees, what does not, by how much, and what to keep in mind."""
    verdict = comparison.verdict
    label_a, label_b = map(shown, comparison.labels)
    apart = "" if verdict.first_step_apart is None else f", first beyond at step {verdict.first_step_apart}"
    lines = [
        f"{label_a} and {label_b} {'agree' if verdict.agree else 'do NOT agree'}:",
        f"  {_mark(verdict.losses_agree)} loss        largest relative difference {verdict.loss:.1e} (step "
        f"{verdict.loss_step}, of {verdict.steps_compared} compared{apart}); tolerance {LOSS_TOLERANCE:.0e}",
        f"  {_mark(verdict.controlnets_agree)} ControlNet  relative L2 difference {verdict.controlnet:.1e} at the end; "
        f"tolerance {CONTROLNET_TOLERANCE:.0e}",
    ]
    if verdict.reduced_precision is not None:
        lines.append(
            f"  The tolerances are for float32. With {verdict.reduced_precision}, rounding alone may exceed them."
        )
    settings = [row.name for row in setting_differences(comparison.a, comparison.b)]
    if settings:
        more = len(settings) - _MOST_SETTINGS
        lines.append(
            f"  Flags that differ: {', '.join(settings[:_MOST_SETTINGS])}{f' and {more} more' if more > 0 else ''}"
        )
    return "\n".join(lines)


def _mark(within: bool) -> str:
    return "ok  " if within else "FAIL"
