"""The counts of a campaign: for a terminal and, as Markdown, for the documentation."""

from collections import Counter
from collections.abc import Iterable, Sequence

from tests.hostile.kinds import KINDS
from tests.hostile.outcome import GOOD, MEANING, Outcome, Result


def as_text(results: Sequence[Result]) -> str:
    """A line per kind, one for all, and one per case that failed."""
    counts = _counts(results)
    shown = [outcome for outcome in MEANING if outcome in GOOD or any(row[outcome] for row in counts.values())]
    lines = [_columns(["", "cases", *shown])]
    lines += [_columns([name, sum(row.values()), *(row[outcome] for outcome in shown)]) for name, row in counts.items()]
    return "\n".join([*lines, *failures(results)])


def failures(results: Iterable[Result]) -> list[str]:
    """One line for each case that failed: how to see it again, and what it showed."""
    return [failure(result) for result in results if not result.is_good]


def failure(result: Result) -> str:
    return f"{result.outcome} {result.kind} --replay {result.seed}:{result.number}  ({result.what}) {result.reason}"


def as_markdown(results: Sequence[Result]) -> str:
    """The two tables of `docs/reliability.md`."""
    counts = _counts(results)
    header = ["kind", "cases", *MEANING]
    rows = [[name, sum(row.values()), *(row[outcome] for outcome in MEANING)] for name, row in counts.items()]
    table = [_row(header), _row(["---", *["---:"] * (len(header) - 1)]), *map(_row, rows)]
    meanings = [_row(["outcome", "means"]), _row(["---", "---"]), *(_row(pair) for pair in MEANING.items())]
    return "\n".join([*table, "", *meanings]) + "\n"


def _counts(results: Sequence[Result]) -> dict[str, Counter[Outcome]]:
    """By kind, those that were run, and of all together."""
    counts = {name: Counter(result.outcome for result in results if result.kind == name) for name in KINDS}
    return {name: row for name, row in counts.items() if row} | {"all": Counter(result.outcome for result in results)}


def _columns(cells: Sequence[object]) -> str:
    return f"{cells[0]!s:<18}" + "".join(f"{cell!s:>11}" for cell in cells[1:])


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(f'{cell:,}' if isinstance(cell, int) else str(cell) for cell in cells)} |"
