"""What both backends leave behind when a run is finished, beside the ControlNet itself."""

import logging
import platform
import resource
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from shared.checkpoints.policy import checkpoints_in
from shared.data.buckets.source import BucketedSource
from shared.evaluation.validation import Validation
from shared.outgoing.redaction import masked, redacted
from shared.run import hub
from shared.run.folder import NOT_WRITTEN, REPORT_FILE, write_report
from shared.run.licence import Licence, licence_of
from shared.run.log import RunLog
from shared.run.model_card import CARD_FILE, BaseKind, CardContent, write_model_card
from shared.run.setup import PreparedRun
from shared.untrusted.border import reason
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_ON_THE_CARD = ("circle_iou", "color_accuracy", "edge_f1", "validation_loss")


@dataclass(frozen=True)
class BackendFacts:
    """What only the backend knows of a finished run.

    `pairs_mismatched` are the pairs of an image and a condition of two shapes, whatever became of them.
    `peak_device_memory_gib` is of the fullest device, None where devices keep no count.
    """

    backend: str
    devices: str
    packages: tuple[str, ...]
    samples_skipped: int
    pairs_mismatched: int
    peak_device_memory_gib: float | None


# UserError: the base model, of which parts are saved too, cannot be read any more.
_CANNOT_WRITE = (OSError, SafetensorError, ValueError)

SaveWeights = Callable[[Path], None]
"""Writes a model in diffusers' layout into a folder."""


def complete_run(
    prepared: PreparedRun,
    step: int,
    log: RunLog,
    validation: Validation,
    facts: BackendFacts,
    started: float,
    weights: Mapping[str, SaveWeights],
) -> None:
    """Save what was trained, then the contact sheet and the model card, report.json, and upload them where asked for.

    What cannot be written keeps nothing of the rest from being tried, and weights for which there is no room in the
    run's folder are put where there is. The report, which says that the run is finished, comes when all of it is there.

    Args:
        started: the reading of `time.perf_counter` when the program began.
        weights: the models that the run trained, by name, in the order of their worth.

    Raises:
        UserError: something could not be written, or not uploaded; says what is where.
    """
    output_dir = prepared.output_dir
    result = _Result(output_dir)
    for name, save in weights.items():
        result.save(name, save)
    report = _report(prepared, step, log, validation, facts, started)
    validation.finish_contact_sheet()
    pictures = [] if validation.images is None else validation.images.pictures(step)
    name = prepared.repository or output_dir.resolve().name
    # A run that uploads nothing may have no network, and does not wait for it.
    licence = licence_of(prepared.config, prepared.base_kind.licence, asks_hub=prepared.repository is not None)
    content = card_content(report, pictures, prepared.base_kind, licence)
    result.write(CARD_FILE, lambda: write_model_card(output_dir, prepared.config, name, content))
    result.write(REPORT_FILE, lambda: write_report(output_dir, report | result.not_written()))
    result.check()
    logger.info("The ControlNet is in %s", output_dir)
    hub.upload_result(prepared.config, output_dir, prepared.repository)


class _Result:
    """What of a finished run is where."""

    def __init__(self, output_dir: Path):
        self._output_dir = output_dir
        self._places: dict[str, Path] = {}
        self._missing: list[str] = []
        self._reason = ""

    def save(self, name: str, save: SaveWeights) -> None:
        """Weights: in the run's folder, or else on another file system."""
        if self.write(name, lambda: save(self._output_dir)):
            self._places[name] = self._output_dir
            return
        folder = _saved_elsewhere(name, self._output_dir, save)
        if folder is not None:
            self._missing.remove(name)
            self._places[name] = folder

    def write(self, name: str, write: Callable[[], object]) -> bool:
        """Whether it is written; if not, that is said at the end."""
        try:
            write()
        except _CANNOT_WRITE as error:
            logger.warning("%s cannot be written to %s (%s)", name, self._output_dir, reason(error))
            self._missing.append(name)
            self._reason = self._reason or reason(error)
            return False
        return True

    def not_written(self) -> dict[str, Any]:
        """For the report, which otherwise says that the run is finished."""
        names = [*self._missing, *(name for name, place in self._places.items() if place != self._output_dir)]
        return {NOT_WRITTEN: names} if names else {}

    def check(self) -> None:
        """Raises UserError with what is where, unless all is where it belongs."""
        if not self._reason:
            return
        places = [f"{name} is in {place}" for name, place in self._places.items()]
        missing = [f"{', '.join(self._missing)} missing"] if self._missing else []
        complete = checkpoints_in(self._output_dir)
        raise UserError(
            f"The training is finished, but not everything could be written to {self._output_dir} ({self._reason}): "
            f"{'; '.join([*places, *missing])}. The last complete checkpoint there is "
            f"{complete[-1].name if complete else 'none'}. If the disk is full, free some space; the same command with "
            f"--resume_from_checkpoint latest, once {REPORT_FILE} is deleted, then writes what is missing from that "
            "checkpoint on."
        )


def _saved_elsewhere(name: str, output_dir: Path, save: SaveWeights) -> Path | None:
    """The folder for temporary files, where it is of another file system and has room; None where not."""
    folder: Path | None = None
    try:
        if not _is_another_file_system(Path(tempfile.gettempdir()), output_dir):
            return None
        folder = Path(tempfile.mkdtemp(prefix="controlnet-"))
        save(folder)
    except _CANNOT_WRITE as error:
        logger.warning("Nor can %s be written among temporary files (%s)", name, reason(error))
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return None
    return folder


def _is_another_file_system(one: Path, other: Path) -> bool:
    return one.stat().st_dev != other.stat().st_dev


def _report(
    prepared: PreparedRun, step: int, log: RunLog, validation: Validation, facts: BackendFacts, started: float
) -> dict[str, Any]:
    held_out = validation.held_out
    source = prepared.source
    return {
        "steps": step,
        "global_batch_size": log.global_batch_size,
        "images_seen": step * log.global_batch_size,
        "loss": log.last_loss,
        **log.speed(),
        **({"weights": "moving average"} if prepared.config.use_ema else {}),
        **({"aspect_buckets": source.counts} if isinstance(source, BucketedSource) else {}),
        "samples_skipped": facts.samples_skipped,
        "pairs_mismatched": facts.pairs_mismatched,
        **({} if held_out is None else held_out.report()),
        "seconds_to_first_step": log.seconds_to_first_step,
        "seconds_total": round(time.perf_counter() - started, 1),
        "peak_host_memory_gib": _peak_host_memory_gib(),
        "peak_device_memory_gib": facts.peak_device_memory_gib,
        "devices": facts.devices,
        "backend": facts.backend,
        "versions": package_versions(facts.packages),
        "command": command_line(),
    }


def card_content(
    report: Mapping[str, Any], pictures: list[tuple[Path, str]], kind: BaseKind, licence: Licence
) -> CardContent:
    """What a card tells of a run with this report, and these validation pictures."""
    facts = {
        "Optimizer steps": report["steps"],
        "Images seen": report["images_seen"],
        **({"Weights": "their moving average over the training (--use_ema)"} if "weights" in report else {}),
        **{name: report[name] for name in _ON_THE_CARD if isinstance(report.get(name), int | float)},
        "Hardware": report["devices"],
        "Software": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    return CardContent(facts, report["command"], pictures, kind, licence)


def _peak_host_memory_gib() -> float:
    """Of this process since its start."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Installed versions, of Python too; a package that is not installed is left out."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def command_line() -> str:
    """The command that started this process, without the value of --hub_token and what addresses hold of secrets."""
    words = ["python3", *sys.argv]
    for index, word in enumerate(words):
        if word == "--hub_token" and index + 1 < len(words):
            words[index + 1] = "***"
        elif word.startswith("--hub_token="):
            words[index] = "--hub_token=***"
    return shlex.join(_redacted_word(word) for word in words)


def _redacted_word(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + masked(redacted(value))
