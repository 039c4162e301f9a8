"""What both backends leave behind when a run is finished, beside the ControlNet itself."""

import logging
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

from shared import hub
from shared.model_card import write_model_card
from shared.preparation import Preparation
from shared.run_folder import write_report
from shared.run_log import RunLog, command_line, package_versions
from shared.validation import Validation

logger = logging.getLogger(__name__)

_ON_THE_CARD = ("circle_iou", "color_accuracy", "edge_f1", "validation_loss")


@dataclass(frozen=True)
class BackendFacts:
    """What only the backend knows of a finished run.

    `peak_device_memory_gib` is of the fullest device, None where devices keep no count.
    """

    backend: str
    devices: str
    packages: tuple[str, ...]
    samples_skipped: int
    peak_device_memory_gib: float | None


def complete_run(
    prepared: Preparation, step: int, log: RunLog, validation: Validation, facts: BackendFacts, started: float
) -> None:
    """Write report.json, the contact sheet and the model card, and upload them where that is asked for.

    `started` is the reading of `time.perf_counter` when the program began.
    """
    output_dir, held_out = prepared.output_dir, validation.held_out
    report: dict[str, Any] = {
        "steps": step,
        "global_batch_size": log.global_batch_size,
        "images_seen": step * log.global_batch_size,
        "loss": log.last_loss,
        "images_per_second": log.images_per_second,
        **log.speed_figures(log.images_per_second),
        **({"weights": "moving average"} if prepared.config.use_ema else {}),
        "samples_skipped": facts.samples_skipped,
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
    write_report(output_dir, report)
    if held_out is not None and held_out.write_contact_sheet(output_dir / "contact_sheet.png"):
        logger.info(
            "Condition, before, after and ground truth are side by side in %s", output_dir / "contact_sheet.png"
        )
    write_model_card(
        output_dir,
        prepared.config,
        name=prepared.repository or output_dir.resolve().name,
        facts=_card_facts(report),
        pictures=[] if validation.images is None else validation.images.pictures(step),
    )
    logger.info("The ControlNet is in %s", output_dir)
    if prepared.repository is not None:
        logger.info("Uploaded: %s", hub.push(prepared.config, output_dir, prepared.repository))


def _card_facts(report: dict[str, Any]) -> dict[str, Any]:
    return {
        "Optimizer steps": report["steps"],
        "Images seen": report["images_seen"],
        **({"Weights": "their moving average over the training (--use_ema)"} if "weights" in report else {}),
        **{name: report[name] for name in _ON_THE_CARD if name in report},
        "Hardware": report["devices"],
        "Software": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }


def _peak_host_memory_gib() -> float:
    """Of this process since its start."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB
