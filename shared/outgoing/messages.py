"""The last place before text leaves the process for a terminal or a log: nothing in it acts, nothing in it is secret.

Whoever puts a name, a caption or a path into a message cuts and escapes it there (`shared.untrusted.shown`); this is
for what was forgotten, and for what libraries say.
"""

import logging
import sys
import traceback
from types import TracebackType

from shared.outgoing.redaction import masked
from shared.untrusted.text import harmless
from shared.user_errors import UserError


def outgoing(text: str) -> str:
    """The text without secrets, with whatever could move a cursor or reverse the reading direction escaped."""
    return harmless(masked(text))


def with_indented_lines(text: str) -> str:
    """The text, in which no line after the first can pass for another message: those begin with two blanks."""
    first, *others = text.split("\n")
    return "\n".join([first, *(line if not line or line.startswith("  ") else f"  {line}" for line in others)])


class OutgoingFormatter(logging.Formatter):
    """Formats records, their tracebacks too, as `outgoing` text of which only the first line begins with a time."""

    def format(self, record: logging.LogRecord) -> str:
        return with_indented_lines(outgoing(super().format(record)))


def print_traceback(error: BaseException) -> None:
    """On stderr, as Python does; the lines of code are shown, their values are not."""
    sys.stderr.write(outgoing("".join(traceback.format_exception(error))))


def print_uncaught(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
    """For `sys.excepthook`."""
    print_traceback(error)


def explain(error: Exception) -> int:
    """Print on stderr what ended the program, and return the exit code of the process.

    2 for a user's mistake, which its message explains; 1 for a defect, whose traceback is shown.
    """
    if isinstance(error, UserError):
        print(with_indented_lines(outgoing(f"error: {error}")), file=sys.stderr)
        return 2
    print_traceback(error)
    return 1


def set_up_logging(backend_package: str, level: int = logging.INFO) -> None:
    """Our own progress, and of the libraries only what is wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(OutgoingFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler], force=True)
    sys.excepthook = print_uncaught
    for package in (backend_package, "shared"):
        logging.getLogger(package).setLevel(level)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
