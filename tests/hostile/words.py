"""The command lines of the runs that read a model or a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

STEP = 2
CHECKPOINT = f"checkpoint-{STEP}"


def model_words(model: Path, output_dir: Path, *more: object) -> Sequence[str]:
    """A run that would train this model a little."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--generated_circles", "8", "--resolution", "32"),
        *("--train_batch_size", "2", "--max_train_steps", "4", "--report_to", "none", "--output_dir", str(output_dir)),
        *map(str, more),
    ]


def checkpoint_words(originals: Path, output_dir: Path, *more: object) -> Sequence[str]:
    """A run of the honest model, which keeps an average, so that a checkpoint holds every kind of file."""
    return model_words(originals / "model", output_dir, "--use_ema", *more)
