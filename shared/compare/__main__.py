"""`python3 -m shared.compare`: see `shared.compare.command.USAGE`."""

import os
import sys
from pathlib import Path

from shared.compare.command import PAGE_NAME, USAGE, TrainBoth, read_command
from shared.outgoing.atomic_files import write_text_atomically
from shared.outgoing.messages import explain
from shared.run.interruption import INTERRUPTED
from shared.untrusted import shown
from shared.user_errors import UserError


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(USAGE, end="")
        return 0
    try:
        command = read_command(words)
        if isinstance(command, TrainBoth):
            from shared.compare.train_both import train_both

            run_a, run_b = train_both(command)
            return _compare(run_a, run_b, command.output_dir / PAGE_NAME)
        return _compare(command.run_a, command.run_b, command.page)
    except ValueError as error:
        return explain(error)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def _compare(run_a: Path, run_b: Path, page: Path) -> int:
    """Compare, write the page, say the verdict; the exit code is 0 where the runs agree, else 1."""
    from shared.compare.comparison import compare
    from shared.compare.run import check_is_finished
    from shared.compare.summary import summary

    check_is_finished(run_a)
    check_is_finished(run_b)
    _make_folder(page.parent)
    comparison = compare(run_a, run_b)
    from shared.compare.page import render  # here, so that no mistake need wait for matplotlib

    _write(page, render(comparison))
    print(summary(comparison))
    print(f"The whole comparison is in {shown(page)}")
    return 0 if comparison.verdict.agree else 1


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder {shown(folder)} cannot be made: {error.strerror}. Give another --output_dir."
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"The folder {shown(folder)} cannot be written to. Give another one with --output_dir.")


def _write(page: Path, html: str) -> None:
    try:
        write_text_atomically(page, html)
    except OSError as error:
        raise UserError(
            f"The page {shown(page)} cannot be written: {error.strerror}. Give another --output_dir."
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
