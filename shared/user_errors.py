"""How the entry points end when something is wrong: one message for a user's mistake, a traceback for a bug."""

import dis
import sys
from pathlib import Path

from shared.outgoing.messages import outgoing, print_traceback, with_indented_lines

_PROJECT = Path(__file__).resolve().parent.parent
_OUR_CODE = tuple(_PROJECT / package for package in ("shared", "flax_trainer", "torch_trainer"))


def explain(error: ValueError) -> int:
    """Print the error to stderr and return the exit code of the process.

    A ValueError that this project's own code raised is written for users and is enough by itself (exit code 2). One
    that comes out of a library or a built-in function is not, and keeps its traceback (exit code 1).
    """
    if is_written_for_users(error):
        print(with_indented_lines(outgoing(f"error: {error}")), file=sys.stderr)
        return 2
    print_traceback(error)
    return 1


def is_written_for_users(error: ValueError) -> bool:
    """Whether a statement of this project's own code raised it.

    The compiled code tells: sources may have been edited since, and what a built-in function raises, which has no frame
    of its own, seems to come from the line that called it.
    """
    place = error.__traceback__
    if place is None:
        return False
    while place.tb_next is not None:
        place = place.tb_next
    code = place.tb_frame.f_code
    ours = any(Path(code.co_filename).resolve().is_relative_to(folder) for folder in _OUR_CODE)
    return ours and dis.opname[code.co_code[place.tb_lasti]] == "RAISE_VARARGS"
