"""The moments at which a run is disturbed, and how each is seen from outside: in the run's folder and at the Hub."""

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from shared.checkpoints.completing import UNFINISHED, WRITTEN_BY_ORBAX
from shared.checkpoints.policy import checkpoint_step, checkpoints_in
from shared.run.folder import REPORT_FILE, RUN_CONFIG, WEIGHTS_FILE
from tests.end_to_end.kill_campaign.kinds import VALIDATION_STEPS, Kind


class Moment(StrEnum):
    STARTING = "reading models"
    COMPILING = "compiling, before the first step"
    STEP = "between steps"
    SAVING = "writing a checkpoint"
    SAVED = "a checkpoint just complete"
    VALIDATING = "validation"
    RESULT = "writing the result"
    UPLOADING = "upload"


class Watch:
    """Of one start of a run: what has happened since.

    `resumed` is the step that it goes on from, 0 for a fresh run.
    """

    def __init__(self, folder: Path, kind: Kind, resumed: int, steps: int, uploads: Callable[[], bool]):
        self._folder, self._kind, self._steps, self._uploads = folder, kind, steps, uploads
        self._resumed = resumed
        self._config, self._weights = _version(folder / RUN_CONFIG), _version(folder / WEIGHTS_FILE)
        self._complete = _complete(folder)
        self._pictures = {step: _version(self._picture(step)) for step in range(steps + 1)}
        self._log_is_own = False

    def is_at(self, moment: Moment, after: int) -> bool:
        """Whether the run is at that moment now; steps and what follows from them not before `after` more of them.

        A checkpoint is just complete where it was not when this was asked before.
        """
        before, self._complete = self._complete, _complete(self._folder)
        if moment is Moment.UPLOADING:
            return self._uploads()
        if moment is Moment.STARTING:
            return not self._has_begun()
        if not self._has_begun() or not self._owns_log():
            return False
        step = max(last_step(self._folder), self._resumed)
        if moment is Moment.COMPILING:
            return step == self._resumed and step < self._steps
        if moment is Moment.RESULT:
            return self._is_writing_result(step)
        if not step - self._resumed >= min(after, self._steps - self._resumed) > 0:
            return False
        if moment is Moment.SAVED:
            return bool(self._complete - before)
        if moment is Moment.SAVING:
            return _is_saving(self._folder)
        validating = self._is_validating(step)
        return validating if moment is Moment.VALIDATING else not (validating or _is_saving(self._folder))

    def _has_begun(self) -> bool:
        """Models are read, and the folder is made the run's own."""
        return _version(self._folder / RUN_CONFIG) != self._config

    def _owns_log(self) -> bool:
        """What a killed run logged after its last checkpoint is gone from the log."""
        self._log_is_own = self._log_is_own or last_step(self._folder) <= self._resumed
        return self._log_is_own

    def _is_validating(self, step: int) -> bool:
        """From the step before it in the log, to the last picture."""
        is_drawn = not self._kind.draws or _version(self._picture(step)) != self._pictures[step]
        return self._validates_after(step + 1) or (self._validates_after(step) and not is_drawn)

    def _validates_after(self, step: int) -> bool:
        return step % VALIDATION_STEPS == 0 or step == self._steps

    def _is_writing_result(self, step: int) -> bool:
        is_begun = _version(self._folder / WEIGHTS_FILE) != self._weights or any(
            self._folder.glob(f".{WEIGHTS_FILE}.*.tmp")
        )
        return step == self._steps and is_begun and not (self._folder / REPORT_FILE).exists()

    def _picture(self, step: int) -> Path:
        return self._folder / "validation" / f"step-{step}" / "0.png"


def last_step(folder: Path) -> int:
    """The last one in a run's log, -1 where there is none."""
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else -1


def _complete(folder: Path) -> set[int]:
    return {checkpoint_step(path) for path in checkpoints_in(folder)}


def _is_saving(folder: Path) -> bool:
    names = [path.name for path in folder.glob("checkpoint-*")]
    return any((name.endswith(UNFINISHED) and ".deleted" not in name) or WRITTEN_BY_ORBAX in name for name in names)


def _version(path: Path) -> tuple[int, int] | None:
    """Another one for every file that takes this place."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
