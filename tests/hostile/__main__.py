"""`python3 -m tests.hostile`: broken and hostile inputs, made from a seed, and what this project does with them.

Every case is a mutation of honest files (a model's folder, a checkpoint, training data, two runs to compare, a
configuration) and is read by the code that a user's command calls, in a process of its own with bounds of time and
memory. The exit code is 0 where every case was handled or harmless.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from tests.hostile import campaign, report
from tests.hostile.kinds import KINDS, numbers_of
from tests.hostile.outcome import Outcome, Result


def main(words: list[str]) -> int:
    arguments = _parser().parse_args(words)
    if arguments.report is not None:
        print(report.as_markdown(_read(arguments.report)), end="")
        return 0
    seed, numbers = arguments.seed, numbers_of(arguments.only or list(KINDS), arguments.cases)
    if arguments.replay is not None:
        seed, numbers = arguments.replay[0], [arguments.replay[1]]
    started = time.monotonic()
    results = campaign.run(
        campaign.Campaign(seed, numbers, arguments.workers, arguments.seconds, arguments.memory * 1024, arguments.keep),
        _Progress(len(numbers)).note,
    )
    if arguments.json is not None:
        arguments.json.write_text("".join(json.dumps(result.as_json()) + "\n" for result in results), encoding="utf-8")
    if arguments.replay is not None:
        print(json.dumps(results[0].as_json(), indent=2))
    else:
        print(report.as_text(results))
        print(f"{len(results):,} cases of seed {seed} in {time.monotonic() - started:,.0f} s")
    return 0 if all(result.is_good for result in results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m tests.hostile", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="decides, with its number, all of a case")
    parser.add_argument("--cases", type=int, default=1000, help="how many")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--workers", type=int, default=2, help="processes at once")
    parser.add_argument("--seconds", type=float, default=20.0, help="that a case may take")
    parser.add_argument("--memory", type=float, default=3.0, help="GiB that a case may take")
    parser.add_argument("--json", type=Path, help="a file for the results, one per line")
    parser.add_argument("--keep", type=Path, help="a folder for the files of the cases that fail")
    parser.add_argument("--replay", type=_seed_and_number, metavar="SEED:NUMBER", help="run this case alone")
    parser.add_argument("--report", type=Path, nargs="+", help="only print, as Markdown, the tables of --json files")
    return parser


def _seed_and_number(text: str) -> tuple[int, int]:
    seed, _, number = text.partition(":")
    return int(seed), int(number)


def _read(paths: list[Path]) -> list[Result]:
    lines = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [Result(**line | {"outcome": Outcome(line["outcome"])}) for line in lines]


class _Progress:
    """Failures as they come, and how far it is."""

    def __init__(self, total: int):
        self._total, self._done = total, 0

    def note(self, result: Result) -> None:
        self._done += 1
        if not result.is_good:
            print(report.failure(result), file=sys.stderr, flush=True)
        if self._done % 200 == 0:
            print(f"{self._done:,} of {self._total:,}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
