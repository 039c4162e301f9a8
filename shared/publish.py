"""`python3 -m shared.publish RUN`: put a finished run on the Hugging Face Hub, as `--push_to_hub` does at its end."""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from shared.config import TrainConfig
from shared.config.command_line import read_configuration
from shared.evaluation.validation_images import prompts_of_pairs, saved_pictures
from shared.models.configs import ControlNetConfig, read_config
from shared.models.source import CONFIG_FILE
from shared.outgoing.messages import set_up_logging
from shared.outgoing.redaction import keep_secret
from shared.run import hub
from shared.run.folder import REPORT_FILE, RUN_CONFIG, finished_steps
from shared.run.interruption import exit_code_of
from shared.run.licence import licence_of
from shared.run.model_card import CARD_FILE, CardContent, kind_of, model_card, write_model_card
from shared.run.result import card_content
from shared.untrusted import MIB, read_file, read_json, shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)


def main(words: list[str]) -> int:
    """0: it is uploaded; 2: a mistake of the user, told in a sentence; 130: Ctrl-C; 1: a defect."""
    parser = argparse.ArgumentParser(
        prog="python3 -m shared.publish",
        description="Upload a finished run's ControlNet, its model card, report and validation pictures to the "
        "Hugging Face Hub.",
        epilog="A README.md that was changed by hand is uploaded as it is; any other is written anew with the "
        "repository's name.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the --output_dir of a run")
    parser.add_argument(
        "--hub_model_id", metavar="NAME", help="the repository; without it, RUN's last part is its name"
    )
    parser.add_argument("--hub_token", metavar="TOKEN", help="in place of the login of `hf auth login`")
    given = parser.parse_args(words)
    if given.hub_token is not None:
        keep_secret(given.hub_token)
    return exit_code_of(partial(_publish, given))


def _publish(given: argparse.Namespace) -> int:
    set_up_logging("shared")
    print(f"Uploaded: {publish(Path(given.run), given.hub_model_id, given.hub_token)}")
    return 0


def publish(run: Path, hub_model_id: str | None, hub_token: str | None) -> str:
    """The address of the commit.

    Raises:
        UserError: it is no finished run, nobody is logged in, or the Hub refuses it.
    """
    config = _configuration(run)
    report = _report(run)
    kind = kind_of(read_config(run / CONFIG_FILE, ControlNetConfig))
    asked = dataclasses.replace(config, push_to_hub=False, hub_model_id=hub_model_id, hub_token=hub_token)
    repository = hub.writable_repository(asked, run)
    pictures = saved_pictures(run, report["steps"], prompts_of_pairs(config))
    licence = licence_of(config, kind.licence, asks_hub=True)
    if _is_as_written(run, config, card_content(report, pictures, kind, kind.licence)):
        _write_card(run, config, repository, card_content(report, pictures, kind, licence))
    else:
        logger.info("%s was changed since the run wrote it, or is of another version, and stays as it is", CARD_FILE)
    return hub.push(asked, run, repository, "Publish a finished training")


def _configuration(run: Path) -> TrainConfig:
    path = run / RUN_CONFIG
    if not os.path.isfile(path):
        raise UserError(f"{shown(run)} has no {RUN_CONFIG}: expected the --output_dir of a training run.")
    return read_configuration(["--config", str(path)])


def _report(run: Path) -> Mapping[str, Any]:
    if finished_steps(run) is None or not os.path.isfile(run / CONFIG_FILE):
        raise UserError(
            f"{shown(run)} holds no finished run, which leaves a ControlNet and {REPORT_FILE}. Continue it with "
            "--resume_from_checkpoint latest."
        )
    report: dict[str, Any] = read_json(run / REPORT_FILE, fix="It cannot be published without.")
    expected = {"steps": int, "images_seen": int, "devices": str, "versions": dict, "command": str}
    for name, kind in expected.items():
        if not isinstance(report.get(name), kind):
            raise UserError(f"{shown(run / REPORT_FILE)} tells no {name}: expected what a run writes at its end.")
    return report


def _is_as_written(run: Path, config: TrainConfig, content: CardContent) -> bool:
    """Whether the card is missing or, but for the names of repository and licence, what a run writes."""
    path = run / CARD_FILE
    if not os.path.lexists(path):
        return True
    there = read_file(path, 64 * MIB).decode("utf-8", "replace")
    return _without_names(there) == _without_names(model_card(run, config, "", content))


def _without_names(card: str) -> list[str]:
    named = ("license", "# ", "controlnet = ", "unet = ")
    return [line for line in card.splitlines() if not line.startswith(named)]


def _write_card(run: Path, config: TrainConfig, repository: str, content: CardContent) -> None:
    try:
        write_model_card(run, config, repository, content)
    except OSError as error:
        raise UserError(f"{shown(run / CARD_FILE)} cannot be written ({error.strerror}).") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
