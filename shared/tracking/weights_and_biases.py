"""Weights & Biases, through its own package."""

import dataclasses
import importlib
import importlib.util
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from shared.config import TrainConfig
from shared.config.options import SECRETS
from shared.config.public import public_config
from shared.user_errors import UserError

_MODES_WITHOUT_LOGIN = ("offline", "disabled", "dryrun")
_DEFAULT_URL = "https://api.wandb.ai"


def check_wandb() -> None:
    """Whether the package is installed and a login at hand, without contacting anyone.

    Raises:
        UserError: one of the two is missing.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            "--report_to wandb needs the wandb package, which is not installed. "
            "Run `pip install wandb`, or give --report_to tensorboard."
        )
    if os.environ.get("WANDB_MODE") in _MODES_WITHOUT_LOGIN or os.environ.get("WANDB_API_KEY"):
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL", _DEFAULT_URL)).hostname or ""
    if not any(_has_entry(path, host) for path in _netrc_files()):
        raise UserError(
            f"--report_to wandb found no login: no WANDB_API_KEY, and no entry for {host} in the netrc file. Run "
            "`wandb login`, or set WANDB_MODE=offline to record without one, or give --report_to tensorboard."
        )


class WandbTracker:
    """Figures, captioned images and the configuration, secrets left out, as one run."""

    def __init__(self, config: TrainConfig, run_directory: Path, continued: str | None = None):
        """`continued` is the id of a run to go on with."""
        self._wandb = importlib.import_module("wandb")
        settings = {
            name: value for name, value in dataclasses.asdict(public_config(config)).items() if name not in SECRETS
        }
        continuing = {} if continued is None else {"id": continued, "resume": "allow", "reinit": True}
        self._run = self._wandb.init(
            project=config.tracker_project_name,
            entity=config.wandb_entity,
            config=settings,
            dir=str(run_directory),
            **continuing,
        )

    @property
    def run_id(self) -> str:
        return str(self._run.id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def images(self, tag: str, images: Sequence[tuple[str, np.ndarray]], step: int) -> None:
        self._run.log({tag: [self._wandb.Image(image, caption=caption) for caption, image in images]}, step=step)

    def truncate_after(self, step: int) -> None:
        """Nothing: a resumed run is a run of its own there."""

    def close(self) -> None:
        self._run.finish()


class WandbRun:
    """Opens the tracker, the second time and later with the same run."""

    def __init__(self, config: TrainConfig, run_directory: Path):
        self._config, self._directory = config, run_directory
        self._tracker: WandbTracker | None = None

    def __call__(self) -> WandbTracker:
        continued = None if self._tracker is None else self._tracker.run_id
        self._tracker = WandbTracker(self._config, self._directory, continued)
        return self._tracker


def _netrc_files() -> list[Path]:
    named = os.environ.get("NETRC")
    return [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]


def _has_entry(path: Path, host: str) -> bool:
    if not path.is_file():
        return False
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except netrc.NetrcParseError as error:
        raise UserError(
            f"{path} cannot be read ({error.msg}, line {error.lineno}), so a wandb login cannot be looked up. "
            "Correct that file, or set WANDB_API_KEY."
        ) from error
