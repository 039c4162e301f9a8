"""One message for a user's mistake, a traceback for a bug; also through the real entry point."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.data.batches import BatchSpec
from shared.outgoing.messages import explain, set_up_logging
from shared.run.setup import total_steps


def raised_by(call: Callable[[], object]) -> ValueError:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each test says what it expects of it
        call()
    return caught.value


def test_a_users_mistake_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    error = raised_by(lambda: total_steps(None, 1, None, 8))
    assert explain(error) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_error_of_a_library_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(raised_by(lambda: np.stack([]))) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last)")
    assert "need at least one array to stack" in shown


def test_an_error_of_a_library_called_by_our_code_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    class Devices(int):
        def __rmul__(self, other: int) -> int:
            return int(np.stack([]))

    assert explain(raised_by(lambda: BatchSpec(1, Devices(1), 1).global_batch_size)) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_a_builtin_called_by_our_code_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    # math.ceil has no frame of its own: the innermost one is total_steps.
    error = raised_by(lambda: total_steps(None, 1, float("nan"), 8))  # type: ignore[arg-type]
    assert explain(error) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "cannot convert float NaN to integer" in shown


def test_the_cause_of_a_users_mistake_is_not_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from shared.models.source import ModelSource
    from shared.models.tokenizer_files import read_tokenizer

    error = raised_by(lambda: read_tokenizer(ModelSource(tmp_path)))
    assert explain(error) == 2
    assert "Traceback" not in capsys.readouterr().err


def raise_as_ours(message: str) -> ValueError:
    """An error of a statement in our own code, with any message."""
    from shared.untrusted import parse_json

    return raised_by(lambda: parse_json(b"", where=message, fix=message))


Log = Callable[[Callable[[logging.Logger], object]], list[str]]
_TOKEN = "hf_" + "AbCdEfGh" * 4


def test_a_users_mistake_forges_no_lines_and_tells_no_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    error = raise_as_ours(f"a\x1b[2J\n12:00:00 INFO all is well\r{_TOKEN} https://user:PASSWORD@host/x?key=PASSWORD")
    assert explain(error) == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("error: a\\x1b[2J\\n12:00")
    assert all(line.startswith("  ") and line.isprintable() for line in others)
    assert not any(secret in line for line in [first, *others] for secret in (_TOKEN, "PASSWORD"))


def test_a_defects_traceback_shows_code_and_no_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    def defect() -> None:
        secret = f"\x1b[2J https://user:PASSWORD@host {_TOKEN}"
        int(secret)

    assert explain(raised_by(defect)) == 1
    shown = capsys.readouterr().err
    assert "int(secret)" in shown
    assert "PASSWORD@" not in shown.replace('f"\\x1b[2J https://user:PASSWORD@host {_TOKEN}"', "")
    assert _TOKEN not in shown
    assert "\x1b" not in shown


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Iterator[Log]:
    """The lines that our log has put on stderr when something was done with a logger."""
    root, hook = logging.getLogger(), sys.excepthook
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in ("shared", "flax_trainer")}

    def lines_of(act: Callable[[logging.Logger], object]) -> list[str]:
        set_up_logging("flax_trainer")
        act(logging.getLogger("shared.anything"))
        return capsys.readouterr().err.splitlines()

    yield lines_of
    root.handlers[:], sys.excepthook = handlers, hook
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_the_log_forges_no_lines(log: Log) -> None:
    lines = log(lambda it: it.warning("skipped %s", "a\x1b[2K\r\n12:00:00 INFO all is well\x9b2J\u202egnp.exe"))
    assert lines[0].endswith(" WARNING skipped a\\x1b[2K\\r")
    assert lines[1:] == ["  12:00:00 INFO all is well\\x9b2J\\u202egnp.exe"]
    assert log(lambda it: it.info("%s", "title\n  indented\nnot"))[1:] == ["  indented", "  not"]


def test_the_log_tells_no_secrets(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "local-0123456789")

    def fail(logger: logging.Logger) -> None:
        try:
            int(f"https://user:PASSWORD@host/a.tar?sig=PASSWORD {_TOKEN}")
        except ValueError:
            logger.exception("failed with %s", "local-0123456789")

    lines = log(fail)
    assert lines[0].endswith(" ERROR failed with ***")
    assert lines[-1] == "  ValueError: invalid literal for int() with base 10: 'https://host/a.tar?*** ***'"


def test_letters_of_all_scripts_are_logged_as_they_are(log: Log) -> None:
    for text in ("Zoë 猫 \u3000 кошка", "\U0001f415\u200d\U0001f9ba", "می\u200cخواهم", "a\u00a0b\tc", "5 × 3 … – “x”"):
        (line,) = log(lambda it, text=text: it.info("%s", text))
        assert line.endswith(f" INFO {text}")


def test_what_nobody_catches_is_harmless_too(log: Log) -> None:
    error = UnicodeError(f"\x1b {_TOKEN}")
    assert log(lambda _: sys.excepthook(type(error), error, None)) == ["UnicodeError: \\x1b ***"]


def test_the_entry_point_ends_with_the_code_of_the_mistake(tmp_path: Path) -> None:
    """An --output_dir with checkpoints is refused by `shared` before models or data are looked at."""
    (tmp_path / "checkpoint-3").mkdir()
    arguments = ["--output_dir", str(tmp_path), "--pretrained_model_name_or_path", "x", "--generated_circles", "8"]
    root = Path(__file__).resolve().parents[3]
    ended = subprocess.run(
        [sys.executable, "train_flax.py", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "already holds checkpoints" in ended.stderr
    assert "Traceback" not in ended.stderr
