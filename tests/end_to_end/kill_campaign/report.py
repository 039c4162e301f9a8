"""The table of a campaign, as it stands in `docs/reliability.md`."""

from collections.abc import Iterable, Sequence

from tests.end_to_end.kill_campaign.campaign import THE_END
from tests.end_to_end.kill_campaign.faults import Means
from tests.end_to_end.kill_campaign.kinds import KINDS
from tests.end_to_end.kill_campaign.moments import Moment
from tests.end_to_end.kill_campaign.outcome import Outcome

_HEADER = ["run", "moment", "kill -9", "SIGTERM", "other", "went on", "began anew", "steps repeated", "failed"]


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """A row per kind of run and moment, and one of all; then what the runs ended with."""
    faults = [outcome for outcome in outcomes if outcome.means != THE_END]
    rows = [
        _counts(kind, moment, of_both)
        for kind in KINDS
        for moment in [*Moment, Means.FULL_DISK, Means.READ_ONLY]
        if (of_both := [outcome for outcome in faults if (outcome.kind, outcome.moment) == (kind, moment)])
    ]
    ends = [outcome for outcome in outcomes if outcome.means == THE_END]
    good = sum(not end.failures for end in ends)
    lines = [_row(_HEADER), _row(["---", "---", *["---:"] * (len(_HEADER) - 2)]), *map(_row, rows)]
    lines += [_row(_counts("all", "", faults)), "", f"{good} of {len(ends)} runs ended as the undisturbed ones."]
    return "\n".join(lines) + "\n"


def _counts(kind: str, moment: str, outcomes: Sequence[Outcome]) -> list[object]:
    kills, stops = (sum(outcome.means == means for outcome in outcomes) for means in (Means.KILL, Means.STOP))
    others = [outcome.means for outcome in outcomes if outcome.means not in (Means.KILL, Means.STOP)]
    went_on = sum(outcome.resumable > 0 for outcome in outcomes)
    failed = sum(bool(outcome.failures) for outcome in outcomes)
    other = ", ".join(f"{others.count(means)} {means}" for means in Means if means in others)
    repeated = sum(outcome.repeated for outcome in outcomes)
    return [kind, moment, kills, stops, other, went_on, len(outcomes) - went_on, repeated, failed]


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"
