"""`python3 -m tests.end_to_end.kill_campaign`: runs that are killed, stopped, left without room, and started anew.

Every run is started again and again with the same command. Each start is disturbed at a moment that is seen to have
come, in one of its processes; then `latest` has to have something to go on from. At the end the run is left alone, and
its curve, checkpoints, ControlNet, TensorBoard figures and upload have to be those of a run that nothing disturbed. The
exit code is 0 where that is so.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.environment import ENVIRONMENT

os.environ.update(ENVIRONMENT)

from tests.end_to_end.kill_campaign import places, report
from tests.end_to_end.kill_campaign.campaign import Campaign, run
from tests.end_to_end.kill_campaign.faults import Means
from tests.end_to_end.kill_campaign.kinds import KINDS
from tests.end_to_end.kill_campaign.outcome import Outcome, failures, line

_OPTIONS = {
    "kills": (Means.KILL, 100),
    "stops": (Means.STOP, 20),
    "disks": (Means.FULL_DISK, 12),
    "read_only": (Means.READ_ONLY, 6),
    "clocks": (Means.STOPPED_CLOCK, 6),
}


def main(words: list[str]) -> int:
    arguments = _parser().parse_args(words)
    if arguments.report is not None:
        lines = [text for path in arguments.report for text in path.read_text(encoding="utf-8").splitlines()]
        print(report.as_markdown([Outcome(**json.loads(text)) for text in lines]), end="")
        return 0
    counts = _possible({means: getattr(arguments, option) for option, (means, _) in _OPTIONS.items()})
    started = time.monotonic()
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="kill-campaign-", dir=arguments.work)).absolute()
    outcomes = run(Campaign(arguments.seed, counts, arguments.only, arguments.workers, work, _note))
    if arguments.json is not None:
        arguments.json.write_text("".join(json.dumps(outcome.as_json()) + "\n" for outcome in outcomes), "utf-8")
    print(report.as_markdown(outcomes), end="")
    print(f"Seed {arguments.seed}, {time.monotonic() - started:,.0f} s.")
    if failures(outcomes):
        print(f"What failed is in {work}", file=sys.stderr)
        return 1
    shutil.rmtree(work)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.end_to_end.kill_campaign", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--seed", type=int, default=0, help="decides what happens when, and to whom")
    for option, (means, count) in _OPTIONS.items():
        parser.add_argument(f"--{option}", type=int, default=count, help=f"how often: {means}")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND", help="of runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at once")
    parser.add_argument("--json", type=Path, help="a file for the results, one per line")
    parser.add_argument("--work", type=Path, help="where the runs are; what failed stays there")
    parser.add_argument("--report", type=Path, nargs="+", help="only print, as Markdown, the table of --json files")
    return parser


def _possible(counts: dict[Means, int]) -> dict[Means, int]:
    """Without what this system does not let us do, which is said."""
    trials = {Means.FULL_DISK: places.make_mounts_private, Means.READ_ONLY: places.try_read_only}
    for means, trial in trials.items():
        try:
            trial()
        except OSError as error:
            print(f"Left out: {means} ({error.strerror}), which needs more rights than there are here", file=sys.stderr)
            counts[means] = 0
    return counts


def _note(outcome: Outcome) -> None:
    print(line(outcome), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
