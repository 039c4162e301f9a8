"""Targets that are bad on purpose, one for every way to be: whoever looks for such things has to find these.

They are cases of negative numbers, and no part of any campaign but the tests of this fuzzer.
"""

import io
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import PIL.Image

from shared.outgoing.atomic_files import write_text_atomically
from shared.untrusted import read_file
from tests.hostile.case import FORGED, Case
from tests.hostile.kinds import place_of
from tests.hostile.mutations.binary import malicious_pickle
from tests.hostile.mutations.pictures import eps_that_writes
from tests.hostile.mutations.tars import swelling_gzip
from tests.hostile.outcome import Outcome, Sign
from tests.hostile.signs import signs_in_files, signs_in_page
from tests.hostile.watched import Attempt


class Proof(NamedTuple):
    """What a target does, and what has to be said of it."""

    name: str
    target: Callable[[Case], int | None]
    expected: Outcome


def build(case: Case) -> Attempt:
    """The case of its number; honest ones and those that leave a page are inspected as other kinds do it."""
    proof = PROOFS[place_of(case.number).rank]
    if proof.target is _cannot_be_built:
        raise RuntimeError("this cannot be built")

    def inspect() -> Sequence[Sign]:
        page = case.out / "page.html"
        of_page = signs_in_page(case, page.read_text(encoding="utf-8")) if page.exists() else ()
        return [*of_page, *signs_in_files(case, case.out)]

    return Attempt(
        proof.name,
        lambda: proof.target(case),
        inspect,
        is_honest=proof.name.startswith("honest"),
        private=(case.outside,) if "private" in proof.name else (),
    )


def _hands_eps_to_ghostscript(case: Case) -> None:
    PIL.Image.open(io.BytesIO(eps_that_writes(case))).load()


def _unpickles(case: Case) -> None:
    pickle.loads(malicious_pickle(case))


def _starts_a_program(case: Case) -> None:
    subprocess.run(["true"], check=False)


def _raises(case: Case) -> None:
    raise KeyError("layers")


def _raises_in_a_library(case: Case) -> None:
    int("x")


def _raises_in_a_thread(case: Case) -> None:
    thread = threading.Thread(target=lambda: _raises(case))
    thread.start()
    thread.join()


def _says_nothing(case: Case) -> int:
    return 2


def _refuses(case: Case) -> None:
    read_file(case.inputs / "missing", 1)


def _turns_round(case: Case) -> None:
    while True:
        pass


def _waits_for_a_pipe(case: Case) -> None:
    os.mkfifo(case.inputs / "pipe")
    (case.inputs / "pipe").read_bytes()


def _waits_for_its_input(case: Case) -> None:
    sys.stdin.read()


def _takes_memory(case: Case) -> None:
    taken = []
    while True:
        taken.append(bytearray(b"x" * 2**24))


def _takes_memory_at_once(case: Case) -> None:
    bytes(10**14)


def _swells(case: Case) -> None:
    import gzip

    gzip.decompress(swelling_gzip(b"", 2))


def _floods(case: Case) -> None:
    print("x" * 5_000_000)


def _shows_a_secret(case: Case) -> None:
    print(f"cannot read --seed {case.secret}")


def _opens_a_private_file(case: Case) -> None:
    (case.inputs / "link").symlink_to(case.outside / "secret.txt")
    (case.inputs / "link").read_bytes()


def _copies_a_private_picture(case: Case) -> None:
    PIL.Image.open(case.outside / "private.png").resize((90, 30)).save(case.out / "sheet.webp")


def _shows_a_private_picture(case: Case) -> None:
    import base64

    content = base64.b64encode((case.outside / "private.png").read_bytes()).decode()
    _write_page(case, f'<img src="data:image/png;base64,{content}">')


def _clears_the_screen(case: Case) -> None:
    print(f"skipped \x1b[2J{FORGED}")


def _forges_a_line(case: Case) -> None:
    print(f"skipped a\n{FORGED}: all is well")


def _forges_over_a_line(case: Case) -> None:
    print(f"skipped a\r{FORGED}: all is well")


def _has_a_script(case: Case) -> None:
    _write_page(case, "<svg aria-label='x'><script>alert(1)</script></svg>")


def _has_a_handler(case: Case) -> None:
    _write_page(case, "<img src='data:image/png;base64,' onerror='alert(1)'>")


def _loads_from_elsewhere(case: Case) -> None:
    _write_page(case, "<img src='https://host.example/x.png'>")


def _has_no_policy(case: Case) -> None:
    write_text_atomically(case.out / "page.html", "<p>text")


def _writes_text(case: Case) -> None:
    _write_page(case, "<p>&lt;script&gt; <a href='#x'>x</a>")


def _write_page(case: Case, body: str) -> None:
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    write_text_atomically(case.out / "page.html", policy + body)


def _segfaults(case: Case) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _leaves(case: Case) -> None:
    os._exit(0)


def _cannot_be_built(case: Case) -> None:
    """It is not asked to."""


def _works(case: Case) -> None:
    print("skipped 'a\\nFORGED': it is no picture")


PROOFS: Sequence[Proof] = (
    Proof("hands EPS to Ghostscript", _hands_eps_to_ghostscript, Outcome.EXECUTED),
    Proof("unpickles", _unpickles, Outcome.EXECUTED),
    Proof("starts a program", _starts_a_program, Outcome.EXECUTED),
    Proof("raises", _raises, Outcome.TRACEBACK),
    Proof("raises in a library", _raises_in_a_library, Outcome.TRACEBACK),
    Proof("raises in a thread", _raises_in_a_thread, Outcome.TRACEBACK),
    Proof("ends without a word", _says_nothing, Outcome.TRACEBACK),
    Proof("turns round", _turns_round, Outcome.ENDLESS),
    Proof("waits for a pipe", _waits_for_a_pipe, Outcome.ENDLESS),
    Proof("waits for its input", _waits_for_its_input, Outcome.ENDLESS),
    Proof("takes memory", _takes_memory, Outcome.UNBOUNDED),
    Proof("takes memory at once", _takes_memory_at_once, Outcome.UNBOUNDED),
    Proof("swells", _swells, Outcome.UNBOUNDED),
    Proof("floods", _floods, Outcome.UNBOUNDED),
    Proof("shows a secret", _shows_a_secret, Outcome.LEAKED),
    Proof("opens a private file", _opens_a_private_file, Outcome.LEAKED),
    Proof("copies a picture", _copies_a_private_picture, Outcome.LEAKED),
    Proof("shows a picture", _shows_a_private_picture, Outcome.LEAKED),
    Proof("clears the screen", _clears_the_screen, Outcome.FORGED),
    Proof("forges a line", _forges_a_line, Outcome.FORGED),
    Proof("forges over a line", _forges_over_a_line, Outcome.FORGED),
    Proof("page with a script", _has_a_script, Outcome.FORGED),
    Proof("page with a handler", _has_a_handler, Outcome.FORGED),
    Proof("page that loads from elsewhere", _loads_from_elsewhere, Outcome.FORGED),
    Proof("page without a policy", _has_no_policy, Outcome.FORGED),
    Proof("segfaults", _segfaults, Outcome.CRASHED),
    Proof("leaves", _leaves, Outcome.CRASHED),
    Proof("cannot be built", _cannot_be_built, Outcome.BROKEN),
    Proof("honest, and refused", _refuses, Outcome.BROKEN),
    Proof("refuses", _refuses, Outcome.HANDLED),
    Proof("works", _works, Outcome.HARMLESS),
    Proof("page of text", _writes_text, Outcome.HARMLESS),
)
