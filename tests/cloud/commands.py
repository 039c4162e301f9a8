"""What the files of `cloud/` would run, given to the parsers of the programs that it starts."""

import subprocess
import sys
from pathlib import Path

from accelerate.commands.launch import launch_command_parser

from shared.config import TrainConfig, parse_command_line

CLOUD = Path(__file__).resolve().parents[2] / "cloud"
MOUNT = "/mnt/shared"


def flax_config(words: list[str]) -> TrainConfig:
    """Of a command of `train_flax.py`."""
    python, script, *flags = words
    assert python.rpartition("/")[2].startswith("python")
    assert script == "train_flax.py"
    return parse_command_line(flags, "flax")


def launched_config(words: list[str]) -> tuple[dict[str, object], TrainConfig]:
    """Of a command of `accelerate launch`: what accelerate is told, and the training."""
    program, verb, *rest = words
    assert program.endswith("/accelerate")
    assert verb == "launch"
    arguments = launch_command_parser().parse_args(rest)
    assert arguments.training_script == "train_torch.py"
    return vars(arguments), parse_command_line(arguments.training_script_args, "torch")


def goes_on(config: TrainConfig) -> bool:
    """Whether the same command, given on another machine, continues the run, and little is lost between."""
    return (
        config.resume_from_checkpoint == "latest"
        and config.output_dir.startswith(f"{MOUNT}/")
        and "{" not in config.output_dir
        and config.checkpointing_seconds == 300
    )


def shellcheck(script: str) -> None:
    """Fails where shellcheck finds something in a block of bash."""
    program = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run(
        [program, "--shell=bash", "--severity=style", "--exclude=SC1091", "-"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
