"""One message for a user's mistake, a traceback for a bug; also through the real entry point."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.run_log import BatchArithmetic, total_steps
from shared.user_errors import explain


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

    assert explain(raised_by(lambda: BatchArithmetic(1, Devices(1), 1).global_batch_size)) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_a_builtin_called_by_our_code_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    # math.ceil has no frame of its own: the innermost one is total_steps.
    error = raised_by(lambda: total_steps(None, 1, float("nan"), 8))  # type: ignore[arg-type]
    assert explain(error) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "cannot convert float NaN to integer" in shown


def test_the_cause_of_a_users_mistake_is_not_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from shared.data.tokenization import load_tokenizer

    error = raised_by(lambda: load_tokenizer(str(tmp_path)))
    assert explain(error) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_entry_point_ends_with_the_code_of_the_mistake(tmp_path: Path) -> None:
    """An --output_dir with checkpoints is refused by `shared` before models or data are looked at."""
    (tmp_path / "checkpoint-3").mkdir()
    arguments = ["--output_dir", str(tmp_path), "--pretrained_model_name_or_path", "x", "--generated_circles", "8"]
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, "train_flax.py", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "already holds checkpoints" in ended.stderr
    assert "Traceback" not in ended.stderr
