"""The same training on both backends, one after the other."""

import subprocess
import sys
from pathlib import Path

from shared.compare.command import TrainBoth
from shared.user_errors import UserError

_PROJECT = Path(__file__).resolve().parents[2]
_BACKENDS = ("flax", "torch")


def train_both(command: TrainBoth, scripts: Path = _PROJECT) -> tuple[Path, Path]:
    """Run `train_flax.py` and `train_torch.py` of the folder `scripts`; returns the folders of the two runs.

    Their output passes through to the terminal.

    Raises:
        UserError: one of them failed.
        KeyboardInterrupt: Ctrl-C; the trainer that was running has saved its checkpoint.
    """
    for number, backend in enumerate(_BACKENDS, start=1):
        script, folder = scripts / f"train_{backend}.py", command.output_dir / backend
        print(f"===== {number} of {len(_BACKENDS)}: {script.name}, into {folder} =====", file=sys.stderr, flush=True)
        _run([sys.executable, str(script), *command.flags, "--output_dir", str(folder)], script.name)
    return command.output_dir / "flax", command.output_dir / "torch"


def _run(command: list[str], name: str) -> None:
    process = subprocess.Popen(command)
    while True:
        try:
            exit_code = process.wait()
            break
        except KeyboardInterrupt:
            continue  # the trainer got it too, and saves a checkpoint before it ends
    if exit_code == 130:
        raise KeyboardInterrupt
    if exit_code != 0:
        raise UserError(
            f"{name} ended with exit code {exit_code}, so there is nothing to compare. What it wrote stands above."
        )
