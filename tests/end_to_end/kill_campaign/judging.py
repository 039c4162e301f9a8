"""Whether a folder is as it should be: after a fault, and at the end."""

import hashlib
import io
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from itertools import zip_longest
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared import check_run
from shared.checkpoints.policy import checkpoints_in
from shared.user_errors import UserError
from tests.end_to_end.support.comparing import trained_weights
from tests.end_to_end.support.running import losses, untimed_metrics

_NEXT_RUN = re.compile(r"--resume_from_checkpoint latest (?:goes on from checkpoint-(\d+), after step|(starts afresh))")
_one_at_a_time = threading.Lock()  # what a process prints is redirected for all its threads


def resumable_step(folder: Path) -> int:
    """The step that `latest` goes on from, as `python3 -m shared.check_run` says; 0 where it starts afresh.

    Raises:
        ValueError: something is damaged, or `latest` is refused.
    """
    if not folder.is_dir():
        return 0
    said = io.StringIO()
    with _one_at_a_time, redirect_stdout(said):
        code = check_run.main([str(folder)])
    found = _NEXT_RUN.search(said.getvalue())
    if code != 0 or found is None:
        raise UserError(f"check_run ends with {code}: {said.getvalue()}")
    return int(found[1] or 0)


def differences(run: Path, whole: Path, uploaded: Mapping[str, bytes]) -> Iterator[str]:
    """What a disturbed run left otherwise than an undisturbed one, and what of it is not at the Hub; a line each."""
    if _curve(run) != _curve(whole):
        yield f"metrics.jsonl: {_first_difference(run, whole)}"
    names = [[path.name for path in checkpoints_in(folder)] for folder in (run, whole)]
    if names[0] != names[1]:
        yield f"checkpoints: {names[0]}, not {names[1]}"
    entries = [{path.name for path in folder.iterdir()} for folder in (run, whole)]
    if entries[0] != entries[1]:
        yield f"entries of the folder: {sorted(entries[0] ^ entries[1])} are in one of both alone"
    weights = trained_weights(run)
    for name, value in trained_weights(whole).items():
        if not np.array_equal(weights[name], value):
            yield f"the ControlNet's {name}"
    names = sorted(
        {picture.relative_to(folder) for folder in (run, whole) for picture in folder.glob("validation/*/*")}
    )
    for name in names:
        if not (run / name).is_file() or (run / name).read_bytes() != (whole / name).read_bytes():
            yield f"the picture {name}"
    yield from _faults_of_tensorboard(run, whole)
    for name in ("diffusion_pytorch_model.safetensors", "config.json", "README.md"):
        if _digest(uploaded.get(name, b"")) != _digest((run / name).read_bytes()):
            yield f"at the Hub, {name}"


def _faults_of_tensorboard(run: Path, whole: Path) -> Iterator[str]:
    """Its writer works in the background and may lose the seconds before a kill; nothing may come twice."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it remarks on every purge
    events = EventAccumulator(str(run / "logs" / "train_controlnet"), size_guidance={"scalars": 0}).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    steps = [step for step, _ in shown]
    if sorted(set(steps)) != steps:
        yield f"TensorBoard shows steps twice or out of order: {steps}"
    expected = losses(whole)
    if not steps or steps[-1] != len(expected):
        yield f"TensorBoard ends at step {steps[-1:]}, not {len(expected)}"
    wrong = [step for step, value in shown if not np.isclose(value, expected[step - 1], rtol=1e-6)]
    if wrong:
        yield f"TensorBoard shows another loss at the steps {wrong}"


def _first_difference(run: Path, whole: Path) -> str:
    given, expected = _curve(run), _curve(whole)
    return next((f"{one}, not {other}" for one, other in zip_longest(given, expected) if one != other), "")


def _curve(run: Path) -> list[dict[str, float]]:
    """What the log says of each step. A validation that a stopped run left out has a line of its own, after it."""
    curve: list[dict[str, float]] = []
    for entry in untimed_metrics(run):
        if curve and curve[-1]["step"] == entry["step"] and "loss" not in entry and "validation_loss" not in curve[-1]:
            curve[-1] = curve[-1] | entry
        else:
            curve.append(entry)
    return curve


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
