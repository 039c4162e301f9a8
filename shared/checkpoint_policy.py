"""Which checkpoint a run resumes from, and whether it may: the same rules for both backends."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from shared.config import TrainConfig
from shared.config.options import FLAGS

CHECKPOINT_PREFIX = "checkpoint-"

# What decides the content of a global batch or the meaning of the parameters. Everything else (learning rate, steps,
# logging, devices, workers, ...) may change between the parts of a run.
_MUST_MATCH = (
    "seed",
    "resolution",
    "image_interpolation_mode",
    "proportion_empty_prompts",
    "max_train_samples",
    "shuffle_buffer_size",
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "pretrained_vae_model_name_or_path",
    "controlnet_model_name_or_path",
    "controlnet_revision",
    "tokenizer_name",
    "use_ema",
    "only_mid_control",
    "sd_unlocked",
)


# For checkpoints that are older than one of these flags.
_DEFAULTS = {name: FLAGS[name].default for name in _MUST_MATCH}


def checkpoint_step(path: Path) -> int:
    """N of `.../checkpoint-N`."""
    return int(path.name.removeprefix(CHECKPOINT_PREFIX))


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder called `checkpoint-N` (which Orbax's unfinished ones are not)."""
    return re.fullmatch(rf"{CHECKPOINT_PREFIX}\d+", path.name) is not None and path.is_dir()


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    found = filter(is_checkpoint, directory.iterdir()) if directory.is_dir() else ()
    return sorted(found, key=checkpoint_step)


def checkpoint_to_resume(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The folder that `--resume_from_checkpoint` means: `latest`, a name in `output_dir`, a path. None: start afresh.

    `latest` in a folder without checkpoints starts afresh, so that one command line can be repeated until it is done.

    Raises:
        ValueError: the named checkpoint does not exist, or a fresh run would mix with the checkpoints of another.
    """
    existing = checkpoints_in(output_dir)
    names = ", ".join(path.name for path in existing) or "none"
    if resume_from_checkpoint is None:
        if existing:
            raise ValueError(
                f"--output_dir {output_dir} already holds checkpoints of a run ({names}). To continue it, add "
                "--resume_from_checkpoint latest; to start a new one, choose another --output_dir or delete them."
            )
        return None
    if resume_from_checkpoint == "latest":
        return existing[-1] if existing else None
    for path in (output_dir / resume_from_checkpoint, Path(resume_from_checkpoint)):
        if is_checkpoint(path):
            return path
    raise ValueError(
        f"--resume_from_checkpoint {resume_from_checkpoint}: there is no such checkpoint. Expected 'latest', the name "
        f"of a checkpoint in {output_dir} (there: {names}), or the path of a {CHECKPOINT_PREFIX}N folder."
    )


def checkpoint_record(config: TrainConfig, manifest: dict[str, Any], global_batch_size: int) -> dict[str, Any]:
    """What a checkpoint says about the run it belongs to, exactly as it reads back from JSON (lists, no tuples)."""
    record = {
        "configuration": {name: getattr(config, name) for name in _MUST_MATCH},
        "global_batch_size": global_batch_size,
        "data": manifest,
    }
    return json.loads(json.dumps(record))


def check_resumable(checkpoint: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run on other data or with settings that change what its batches are.

    Local data with the same fingerprint may have moved: its `location` is not compared.

    Raises:
        ValueError: naming everything that differs, with both values.
    """
    moved = {"location"} if _may_have_moved(saved["data"], current["data"]) else set()
    differences = [
        f"{where}{name}: {before.get(name)!r} in the checkpoint, {now.get(name)!r} now"
        for where, before, now, ignored in (
            ("--", _DEFAULTS | saved["configuration"], current["configuration"], set()),
            ("data ", saved["data"], current["data"], moved),
        )
        for name in sorted({*before, *now} - ignored)
        if before.get(name) != now.get(name)
    ]
    if saved["global_batch_size"] != current["global_batch_size"]:
        differences.append(
            f"global batch size (--train_batch_size x devices x --gradient_accumulation_steps): "
            f"{saved['global_batch_size']} in the checkpoint, {current['global_batch_size']} now"
        )
    if differences:
        raise ValueError(
            f"{checkpoint} cannot be resumed by this command, because these differ:\n  "
            + "\n  ".join(differences)
            + "\nGive the values of the checkpoint, or start a new run in another --output_dir."
        )


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step` to `….abandoned`: a run that goes back to `step` takes another course.

    Otherwise `latest` would later find them and mix two courses. Returns the new paths.
    """
    later = [path for path in checkpoints_in(output_dir) if checkpoint_step(path) > step]
    renamed = []
    for path in later:
        target = path.with_name(f"{path.name}.abandoned")
        if target.exists():
            shutil.rmtree(target)
        renamed.append(path.rename(target))
    return renamed


def _may_have_moved(saved: dict[str, Any], current: dict[str, Any]) -> bool:
    fingerprint, locations = current.get("fingerprint"), current.get("location")
    if fingerprint is None or fingerprint != saved.get("fingerprint"):
        return False
    paths = locations if isinstance(locations, list) else [locations]
    return all(isinstance(path, str) and Path(path).exists() for path in paths)
