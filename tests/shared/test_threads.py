"""Work in a thread of its own, and the end of a process that has some."""

import subprocess
import sys

import pytest

from shared.threads import in_background
from tests.end_to_end.support.running import PROJECT


def test_background_work_gives_its_result_or_its_error() -> None:
    assert in_background(divmod, 7, 2).result() == (3, 1)
    with pytest.raises(ZeroDivisionError):
        in_background(divmod, 7, 0).result()


def test_a_process_ends_after_its_background_work_with_its_own_exit_code() -> None:
    """A thread that is taken out of a compiler when the interpreter ends takes the whole process down."""
    code = (
        "import sys, time\n"
        "from shared.threads import in_background\n"
        "in_background(lambda: (time.sleep(0.3), print('compiled')))\n"
        "print('mistake', flush=True)\n"
        "sys.exit(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert (done.returncode, done.stdout, done.stderr) == (2, "mistake\ncompiled\n", "")


def test_a_process_ends_at_once_where_threads_are_left_behind() -> None:
    code = (
        "import threading\n"
        "from shared.threads import end_process, leave_behind\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "print('told')\n"
        "leave_behind()\n"
        "end_process(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (2, "told\n", "")
