"""What a training step would need of a TPU slice, told by the TPU's compiler; no TPU and no weights are needed.

    python3 -m flax_trainer.compile_report --target v4-8 --model sd15 --mixed_precision bf16 --train_batch_size 8

Compiles the step that `train_flax.py` would run with the same flags (any of them; the data are not read, and need not
be named), which takes, for Stable Diffusion on two cores, ten to thirty minutes and up to 28 GB of memory. Give
--model, or --pretrained_model_name_or_path with a folder or repository, of which only the config.json files are read.
What it prints is a compiler's estimate.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler is enough: a TPU that is there may be busy

from flax_trainer.base_models import ModelConfigs, read_configs
from flax_trainer.compile_report.apart import compile_report_apart
from flax_trainer.compile_report.batch_size import find_batch_size
from flax_trainer.compile_report.report import DoesNotFitError, given_flags
from flax_trainer.compile_report.targets import Target, parse_target
from flax_trainer.compile_report.text import does_not_fit_text, notes, report_text
from flax_trainer.random_model import ARCHITECTURES
from shared.config import TrainConfig, read_configuration, validate
from shared.diffusion.schedule import NoiseSchedule
from shared.preparation import check_resolution
from shared.user_errors import explain

_MODELS = (
    "pretrained_model_name_or_path",
    "controlnet_model_name_or_path",
    "pretrained_vae_model_name_or_path",
)
_DATA = ("dataset_name", "train_data_dir", "train_shards", "generated_circles")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m flax_trainer.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--target", required=True, help="v4-8, v5e-4 (or v5litepod-4), v5p-8, v6e-4 … up to 256 chips")
    parser.add_argument("--model", choices=ARCHITECTURES, help="a built-in architecture instead of a model's folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument(
        "--find_batch_size",
        action="store_true",
        help="search the largest --train_batch_size that fits, without and with gradient checkpointing",
    )
    parser.add_argument(
        "--cached_latents", action="store_true", help="batches that bring latents and text embeddings: no VAE, no text"
    )
    own, training = parser.parse_known_args(argv)
    try:
        target = parse_target(own.target)
        config = _configuration(training, own.model)
        _check_file(own.json)
        return _report(config, target, own)
    except ValueError as error:
        return explain(error)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _report(config: TrainConfig, target: Target, own: argparse.Namespace) -> int:
    configs, schedule = _model(config, own.model)
    check_resolution(config, configs.vae.scale_factor)
    for note in notes(config, configs):
        print(note, flush=True)
    if own.find_batch_size:
        found = find_batch_size(config, configs, schedule, target, from_cache=own.cached_latents)
        _write(own.json, {policy: None if report is None else report.as_json() for policy, report in found.items()})
        return 0 if any(found.values()) else 1
    try:
        report = compile_report_apart(config, configs, schedule, target, from_cache=own.cached_latents)
    except DoesNotFitError as error:
        print(does_not_fit_text(config, target, error))
        flags = given_flags(config, from_cache=own.cached_latents)
        _write(own.json, {"target": target.name, "flags": flags, "fits": False})
        return 1
    print(report_text(report))
    _write(own.json, report.as_json() | {"fits": True})
    return 0


def _configuration(training: list[str], model: str | None) -> TrainConfig:
    """The training flags' configuration, which need not name data."""
    config = read_configuration(training)
    if model is not None:
        named = [f"--{name}" for name in _MODELS if getattr(config, name) is not None]
        if named:
            raise ValueError(f"--model {model} stands for all models of a run: leave it out, or {', '.join(named)}.")
        config = dataclasses.replace(config, pretrained_model_name_or_path=model)
    names_data = any(getattr(config, name) is not None for name in _DATA)
    validate(config if names_data else dataclasses.replace(config, generated_circles=1), "flax")
    return config


def _check_file(file: Path | None) -> None:
    """Before minutes are spent on what is to be written there."""
    if file is None:
        return
    if file.is_dir():
        raise ValueError(f"--json is {file}, which is a folder: give a file's name, as {file / 'report.json'}.")
    if not file.absolute().parent.is_dir():
        raise ValueError(
            f"--json is {file}, but there is no folder {file.absolute().parent}: make it, or give another."
        )


def _write(file: Path | None, figures: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _model(config: TrainConfig, model: str | None) -> tuple[ModelConfigs, NoiseSchedule]:
    if model is None:
        return read_configs(config), NoiseSchedule.from_pretrained(
            str(config.pretrained_model_name_or_path), revision=config.revision, cache_dir=config.cache_dir
        )
    parts = ARCHITECTURES[model]
    configs = ModelConfigs.of(parts.unet, parts.vae, parts.text_encoder, parts.text_encoder_2)
    return configs, NoiseSchedule.from_config(parts.scheduler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
