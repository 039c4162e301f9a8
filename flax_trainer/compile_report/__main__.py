"""What a training step would need of a TPU slice, told by the TPU's compiler; no TPU and no weights are needed.

    python3 -m flax_trainer.compile_report --target v4-8 --model sd15 --mixed_precision bf16 --train_batch_size 8

Compiles the step that `train_flax.py` would run with the same flags (any of them; the data are not read, and need not
be named), which takes, for Stable Diffusion on two cores, ten to thirty minutes and up to 28 GB of memory. Give
--model, or --pretrained_model_name_or_path with a folder or repository, of which only the config.json files are read.
What it prints is a compiler's estimate.
"""

import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from shared.user_errors import UserError

os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler is enough: a TPU that is there may be busy

from flax_trainer.base_models import ModelConfigs, read_configs
from flax_trainer.compile_report.batch_size import find_batch_size
from flax_trainer.compile_report.drawing import compile_drawing_report
from flax_trainer.compile_report.in_subprocess import in_subprocess
from flax_trainer.compile_report.report import DoesNotFitError, compile_report, given_flags
from flax_trainer.compile_report.targets import Target, parse_target
from flax_trainer.compile_report.text import (
    does_not_fit_text,
    drawing_does_not_fit_text,
    drawing_text,
    notes,
    report_text,
)
from flax_trainer.random_model import ARCHITECTURES
from shared.config import TrainConfig, validate
from shared.config.command_line import read_beside_own_flags
from shared.config.flags import flag, flags_of
from shared.config.options import FLAGS
from shared.diffusion.schedule import NoiseSchedule
from shared.models.source import base_source
from shared.outgoing.atomic_files import write_text_atomically
from shared.outgoing.messages import explain
from shared.outgoing.redaction import described
from shared.run.setup import check_resolution
from shared.untrusted import shown

_MODELS = [name for name, declared in FLAGS.items() if declared.names == "weights"]
_DATA = [name for name, declared in FLAGS.items() if declared.names == "data"]


_own = partial(flag, "compile_report")


@dataclasses.dataclass(frozen=True)
class OwnFlags:
    """What is asked beside the flags of the training."""

    target: str | None = _own(None, "v4-8, v5e-4 (or v5litepod-4), v5p-8, v6e-4 … up to 256 chips; needed.")
    model: str | None = _own(
        None, f"A built-in architecture ({', '.join(ARCHITECTURES)}) in place of a model's folder."
    )
    json: str | None = _own(None, "The file to write the figures to, too.")
    find_batch_size: bool = _own(
        False, "Search the largest --train_batch_size that fits, without and with gradient checkpointing."
    )
    generate: bool = _own(
        False, "Draw pictures in place of a step: 20 of UniPC's, --train_batch_size pictures at once on every chip."
    )
    cached_latents: bool = _own(False, "Batches that bring latents and text embeddings: no VAE, no text encoder.")

    @property
    def file(self) -> Path | None:
        return None if self.json is None else Path(self.json)


_FLAGS = flags_of(OwnFlags)


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__, "Flags of its own:", *(f"  --{flag.name}  {flag.help}" for flag in _FLAGS.values()), sep="\n")
        return 0
    try:
        config, given = read_beside_own_flags(argv, _FLAGS)
        own = OwnFlags(**given)
        _check_own(own)
        target = parse_target(str(own.target))
        config = _checked(config, own.model)
        _check_file(own.file)
        return _report(config, target, own)
    except ValueError as error:
        return explain(error)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _check_own(own: OwnFlags) -> None:
    if own.target is None:
        raise UserError("--target is missing: name the TPU slice to compile for, as v4-8.")
    of_a_step = [f"--{name}" for name in ("find_batch_size", "cached_latents") if getattr(own, name)]
    if own.generate and of_a_step:
        raise UserError(f"--generate draws pictures, and {of_a_step[0]} is about a training step: give one of them.")


def _report(config: TrainConfig, target: Target, own: OwnFlags) -> int:
    configs, schedule = _model(config, own.model)
    check_resolution(config, configs.vae.scale_factor)
    for note in notes(config, configs):
        print(note, flush=True)
    if own.find_batch_size:
        found = find_batch_size(config, configs, schedule, target, from_cache=own.cached_latents)
        _write(own.file, {policy: None if report is None else report.as_json() for policy, report in found.items()})
        return 0 if any(found.values()) else 1
    models = (config, configs, schedule, target)
    try:
        if own.generate:
            drawing = in_subprocess(compile_drawing_report, *models)
            text, figures = drawing_text(drawing), drawing.as_json()
        else:
            report = in_subprocess(compile_report, *models, from_cache=own.cached_latents)
            text, figures = report_text(report), report.as_json()
    except DoesNotFitError as error:
        say = drawing_does_not_fit_text if own.generate else does_not_fit_text
        print(say(config, target, error))
        flags = given_flags(config, from_cache=own.cached_latents, generate=own.generate)
        _write(own.file, {"target": target.name, "flags": flags, "fits": False})
        return 1
    print(text)
    _write(own.file, figures | {"fits": True})
    return 0


def _checked(config: TrainConfig, model: str | None) -> TrainConfig:
    """The training flags' configuration, which need not name data, with the built-in model in it."""
    if model is not None:
        if model not in ARCHITECTURES:
            raise UserError(f"--model is {described(model)}; expected one of {', '.join(ARCHITECTURES)}.")
        named = [f"--{name}" for name in _MODELS if getattr(config, name) is not None]
        if named:
            raise UserError(f"--model {model} stands for all models of a run: leave it out, or {', '.join(named)}.")
        config = dataclasses.replace(config, pretrained_model_name_or_path=model)
    names_data = any(getattr(config, name) is not None for name in _DATA)
    validate(config if names_data else dataclasses.replace(config, generated_circles=1), "flax")
    return config


def _check_file(file: Path | None) -> None:
    """Before minutes are spent on what is to be written there."""
    if file is None:
        return
    try:
        if file.is_dir():
            raise UserError(f"--json is {shown(file)}, which is a folder: give a file's name, as report.json in it.")
        if file.exists() and not file.is_file():
            raise UserError(f"--json is {shown(file)}, which is no file: give a file's name.")
        if not file.absolute().parent.is_dir():
            raise UserError(
                f"--json is {shown(file)}, but there is no folder {shown(file.absolute().parent)}: make it, or give "
                "another."
            )
    except OSError as error:  # a folder on the way that may not be entered, a name that is too long
        raise UserError(f"--json is {shown(file)}: {error.strerror}. Give another file.") from error


def _write(file: Path | None, figures: dict[str, Any]) -> None:
    if file is None:
        return
    try:
        write_text_atomically(file, json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json: {shown(file)} cannot be written ({error.strerror}). Give another file.") from error


def _model(config: TrainConfig, model: str | None) -> tuple[ModelConfigs, NoiseSchedule]:
    if model is None:
        return read_configs(config), NoiseSchedule.from_source(base_source(config, "scheduler"))
    parts = ARCHITECTURES[model]
    configs = ModelConfigs.of(parts.unet, parts.vae, parts.text_encoder, parts.text_encoder_2, config.control_channels)
    return configs, NoiseSchedule.from_config(parts.scheduler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
