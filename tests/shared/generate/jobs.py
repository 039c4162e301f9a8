"""A job as the command prepares it."""

from pathlib import Path

from shared.generate.command import read_command
from shared.generate.preparation import Job, prepare_job

PROMPT = "red circle with blue background"


def prepared(run: Path, condition: Path, *more: object) -> Job:
    words = [
        *("--controlnet_model_name_or_path", run, "--conditioning_image", condition, "--prompt", PROMPT),
        *("--output_dir", condition.parent / "pictures"),
        *more,
    ]
    return prepare_job(read_command([*map(str, words)]), "flax")
