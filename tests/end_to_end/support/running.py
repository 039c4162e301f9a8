"""Runs the entry points as users do: from the command line, most of them in a process of their own."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
CONFIGS = PROJECT / "torch_trainer" / "accelerate_configs"

Arguments = Sequence[str | Path | int | float]

_WITHOUT_TORCH = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "accelerate", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] in ("torch", "diffusers", "accelerate", "torchvision") else found(name, package)
)
import train_flax

exit_code = train_flax.main(sys.argv[1:])
assert not {"torch", "diffusers", "accelerate"} & set(sys.modules)
sys.exit(exit_code)
"""

_TIMED = {"images_per_second", "data_wait", "host_to_device", "model_tflops_per_second", "mfu"}
_ACCELERATE_LAUNCH = "accelerate.commands.launch"
# A thread per process: more of them on a busy machine wait for each other, and sums keep their order.
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def train_flax(arguments: Arguments, *, devices: int = 1, folder: Path = PROJECT, **environment: str) -> str:
    """Run `train_flax.py` to its end; returns what it wrote to stderr and stdout. Fails where it fails."""
    return finish(start_train_flax(arguments, devices=devices, folder=folder, **environment))


def train_flax_without_torch(arguments: Arguments, *, devices: int) -> str:
    """As `train_flax`, where torch, diffusers and accelerate cannot be found. Fails where anything asks for them."""
    on_devices = {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(PROJECT)}
    return finish(_start(["-c", _WITHOUT_TORCH, *arguments], on_devices))


def train_flax_here(arguments: Arguments) -> str:
    """As `train_flax` with the eight devices of this process, which spares the seconds that importing takes."""
    import train_flax as entry_point

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        exit_code = entry_point.main([*map(str, arguments)])
    assert exit_code == 0, output.getvalue()
    return output.getvalue()


def start_train_flax(
    arguments: Arguments, *, devices: int = 1, folder: Path = PROJECT, **environment: str
) -> subprocess.Popen[str]:
    """The same, still running."""
    on_devices = {"JAX_NUM_CPU_DEVICES": str(devices)}
    return _start([PROJECT / "train_flax.py", *arguments], on_devices | environment, folder)


def start_flax_processes(
    arguments: Arguments, *, devices: int, more: Sequence[Arguments] = ((), ()), **environment: str
) -> list[subprocess.Popen[str]]:
    """`train_flax.py` in several processes that train together, with `devices` each; `more` is what each is told."""
    address = f"127.0.0.1:{free_port()}"
    joining = ["--coordinator_address", address, "--num_processes", len(more), "--process_id"]
    return [
        start_train_flax([*arguments, *joining, number, *own], devices=devices, **environment)
        for number, own in enumerate(more)
    ]


def train_torch(arguments: Arguments, **environment: str) -> str:
    """Run `train_torch.py` to its end; returns what it wrote to stderr and stdout. Fails where it fails."""
    return finish(start_train_torch(arguments, **environment))


def start_train_torch(arguments: Arguments, **environment: str) -> subprocess.Popen[str]:
    """The same, still running."""
    return _start([PROJECT / "train_torch.py", *arguments], environment)


def start_torch_processes(arguments: Arguments, processes: int = 2) -> list[subprocess.Popen[str]]:
    """`train_torch.py` in several processes that train together, without a launcher that would end them all."""
    joining = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [start_train_torch(arguments, **joining, **rank) for rank in ranks]


def train_torch_here(arguments: Arguments) -> str:
    """As `train_torch`, in this process, which spares the seconds that importing PyTorch and diffusers takes."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        exit_code = main_of_train_torch(arguments)
    assert exit_code == 0, output.getvalue()
    return output.getvalue()


def main_of_train_torch(arguments: Arguments) -> int:
    """The exit code of `train_torch.py`, run in this process like in a fresh one with one thread."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    import train_torch as entry_point

    def forget_accelerate_state() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    forget_accelerate_state()
    try:
        return entry_point.main([*map(str, arguments)])
    finally:
        forget_accelerate_state()
        torch.set_num_threads(threads)


def launch_torch(
    launcher: Arguments, arguments: Arguments, *, module: str = _ACCELERATE_LAUNCH, folder: Path = PROJECT
) -> str:
    """Run `accelerate launch LAUNCHER train_torch.py ARGUMENTS` to its end, as `train_torch` does."""
    return finish(start_launch_torch(launcher, arguments, module=module, folder=folder))


def start_launch_torch(
    launcher: Arguments, arguments: Arguments, *, module: str = _ACCELERATE_LAUNCH, folder: Path = PROJECT
) -> subprocess.Popen[str]:
    """The same, still running. `torch.distributed.run` as the module is plain torchrun."""
    return _start(["-m", module, *launcher, PROJECT / "train_torch.py", *arguments], {}, folder)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a process; returns its output. Fails where it fails."""
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 300) -> None:
    """Wait for something that a running process does. Fails where that ends first."""
    deadline = time.monotonic() + timeout
    try:
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
    except BaseException:
        process.kill()
        raise


def stop_after(process: subprocess.Popen[str], run: Path, steps: int, number: signal.Signals) -> tuple[int, str]:
    """Send a signal once a run has logged so many steps; returns the exit code and the output."""
    wait_until(lambda: logged_steps(run) >= steps, process)
    process.send_signal(number)
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, output


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def logged_steps(run: Path) -> int:
    """The number of lines in the metrics.jsonl of a run that may be only starting."""
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed_metrics(run: Path) -> list[dict[str, float]]:
    """The same without what depends on the machine's speed."""
    return [{name: value for name, value in entry.items() if name not in _TIMED} for entry in metrics(run)]


def losses(run: Path) -> list[float]:
    """The training loss of every logged step."""
    return [entry["loss"] for entry in metrics(run) if "loss" in entry]


def _start(arguments: Arguments, environment: dict[str, str], folder: Path = PROJECT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=os.environ | _ONE_THREAD | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
