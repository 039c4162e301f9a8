"""The kinds of runs that are disturbed, and how each is started."""

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from tests.end_to_end.support.running import CONFIGS, PROJECT, free_port
from tests.end_to_end.support.tiny_runs import PROMPT, SIZE

BATCH, CHECKPOINTING_STEPS, VALIDATION_STEPS, KEEP = 2, 3, 4, 2
LAUNCHER = "launcher"


@dataclass(frozen=True)
class Inputs:
    """What all runs read."""

    base_model: Path
    condition: Path


@dataclass(frozen=True)
class Kind:
    """A way to train. `devices` are those of each process; `draws` validation pictures; `flags` are its own."""

    script: str
    processes: int = 1
    devices: int = 1
    draws: bool = False
    flags: tuple[str, ...] = ()

    @property
    def is_launched(self) -> bool:
        """By accelerate."""
        return self.script == "train_torch.py" and self.processes > 1

    @property
    def members(self) -> list[str]:
        """The processes of a run, as `Run.member` knows them."""
        return [*map(str, range(self.processes)), *([LAUNCHER] if self.is_launched else [])]

    def command(self, inputs: Inputs, folder: Path, steps: int) -> list[str]:
        """The script and its arguments, always the same for a folder."""
        drawing = ("--validation_image", inputs.condition, "--validation_prompt", PROMPT, "--num_validation_images", 1)
        words = [
            *(PROJECT / self.script, "--pretrained_model_name_or_path", inputs.base_model, "--resolution", SIZE),
            *("--generated_circles", 24, "--num_evaluation_samples", 2, "--max_train_steps", steps),
            *("--train_batch_size", BATCH // (self.processes * self.devices), "--learning_rate", 1e-3),
            *("--lr_scheduler", "linear", "--lr_warmup_steps", 3, "--checkpointing_steps", CHECKPOINTING_STEPS),
            *("--checkpoints_total_limit", KEEP, "--validation_steps", VALIDATION_STEPS),
            *("--push_to_hub", "--hub_model_id", "me/run", "--output_dir", folder),
            *("--resume_from_checkpoint", "latest", *(drawing if self.draws else ()), *self.flags),
        ]
        return [str(word) for word in words]

    def start(self, command: list[str], environment: Mapping[str, str], output: Path) -> "Run":
        """The same command as before, with what its processes write in a file."""
        environment = {**environment, "JAX_NUM_CPU_DEVICES": str(self.devices)}
        with output.open("w") as file:
            if self.is_launched:
                launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "multi_cpu.yaml")]
                port = ["--main_process_port", str(free_port())]
                return Run([_started([*launcher, *port, *command], environment, file)], self)
            if self.processes == 1:
                return Run([_started(command, environment, file)], self)
            joining = ["--coordinator_address", f"127.0.0.1:{free_port()}", "--num_processes", str(self.processes)]
            return Run(
                [
                    _started([*command, *joining, "--process_id", str(number)], environment, file)
                    for number in range(self.processes)
                ],
                self,
            )


def _started(words: list[str], environment: Mapping[str, str], file: IO[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=PROJECT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
    )


_MESH = ("--parallelism", "mesh", "--fsdp_devices", "2")

KINDS = {
    "Flax": Kind("train_flax.py", devices=2, draws=True),
    "Flax, mesh": Kind("train_flax.py", devices=2, flags=_MESH),
    "Flax, 2 processes": Kind("train_flax.py", processes=2),
    "Flax, 2 processes, mesh": Kind("train_flax.py", processes=2, flags=_MESH),
    "PyTorch": Kind("train_torch.py", draws=True),
    "PyTorch, 2 processes": Kind("train_torch.py", processes=2, draws=True),
}


class Run:
    """The processes of one start of a command."""

    def __init__(self, started: list[subprocess.Popen[bytes]], kind: Kind):
        self._started, self._kind = started, kind
        self._workers: dict[str, psutil.Process] = {}

    @property
    def has_ended(self) -> bool:
        """The first of its processes; others may be left."""
        return any(process.poll() is not None for process in self._started)

    def member(self, name: str) -> psutil.Process | None:
        """A process by its number, or the launcher; None where it is not there (yet, or any more)."""
        if not self._kind.is_launched:
            return _alive(self._started[int(name)].pid)
        if name == LAUNCHER:
            return _alive(self._started[0].pid)
        if name not in self._workers:
            self._find_workers()
        worker = self._workers.get(name)
        return worker if worker is not None and worker.is_running() else None

    def everyone(self) -> list[psutil.Process]:
        """Whoever is there."""
        found = (self.member(name) for name in self._kind.members)
        return [process for process in found if process is not None]

    def wait(self, seconds: float) -> list[int] | None:
        """The exit codes of what was started; None where something is left after that time."""
        deadline = time.monotonic() + seconds
        codes = []
        for process in self._started:
            try:
                codes.append(process.wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                return None
        _, left = psutil.wait_procs(list(self._workers.values()), max(0.0, deadline - time.monotonic()))
        return None if left else codes

    def kill(self) -> None:
        """Whatever is left of it."""
        self._find_workers()
        for process in [*self._workers.values(), *self._started]:
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()
        for started in self._started:
            started.wait()
        psutil.wait_procs(list(self._workers.values()), 30)

    def _find_workers(self) -> None:
        launcher = _alive(self._started[0].pid)
        if not self._kind.is_launched or launcher is None:
            return
        try:
            for child in launcher.children():
                rank = child.environ().get("RANK")
                if rank is not None:
                    self._workers[rank] = child
        except psutil.Error:  # it was just ending
            return


def _alive(pid: int) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None
