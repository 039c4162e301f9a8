"""From the words of a command line to a checked configuration."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from shared.config import Backend
from shared.config.arguments import read_values
from shared.config.help_text import command_help
from shared.config.validation import check_output_dir, check_values
from shared.generate.options import GENERATE_FLAGS, OF_EACH_CONTROLNET, GenerateConfig
from shared.outgoing.messages import set_up_logging
from shared.run.interruption import exit_code_of
from shared.user_errors import UserError

if TYPE_CHECKING:
    from shared.generate.pictures import Artist
    from shared.generate.preparation import Job

_INTRODUCTION = (
    "Draws pictures with a ControlNet. --controlnet_model_name_or_path, --conditioning_image and --prompt are needed; "
    "the base model too, where the ControlNet is not the folder of a training run. The same seed gives the same "
    "pictures on both backends, whatever the number of devices and pictures at once."
)


def generate_by_command(words: Sequence[str], backend: Backend, make_artist: "Callable[[Job], Artist]") -> int:
    """0: the pictures are there; 2: a mistake of the user, told in a sentence; 130: Ctrl-C; 1: a defect.

    `make_artist` loads the models, and the backend's libraries: other mistakes need not wait for them.
    """
    return exit_code_of(partial(_generate, words, backend, make_artist))


def _generate(words: Sequence[str], backend: Backend, make_artist: "Callable[[Job], Artist]") -> int:
    if {"-h", "--help"} & set(words):
        print_help(backend)
        return 0
    config = read_command(words)
    from shared.generate.pictures import generate  # here, so that mistakes in flags need not wait for libraries
    from shared.generate.preparation import prepare_job

    set_up_logging(f"{backend}_trainer")
    job = prepare_job(config, backend)
    generate(job, make_artist(job))
    return 0


def print_help(backend: Backend) -> None:
    """On stdout."""
    sys.stdout.write(command_help(f"python3 -m {backend}_trainer.generate", _INTRODUCTION, GENERATE_FLAGS, backend))


def read_command(words: Sequence[str]) -> GenerateConfig:
    """What the words after the program's name ask for; no file is read.

    Raises:
        UserError: for the first mistake found.
    """
    config = GenerateConfig(**read_values(words, GENERATE_FLAGS))
    check_values(config, GENERATE_FLAGS)
    check_output_dir(config.output_dir)
    _check_what_is_needed(config)
    check_size(config)
    check_what_goes_together(config)
    return config


def check_controlnet_is_named(config: GenerateConfig) -> None:
    """Raises UserError where none is."""
    if config.controlnet_model_name_or_path is None:
        raise UserError(
            "--controlnet_model_name_or_path is missing: name the ControlNet, the --output_dir of a training run, for "
            "example, or lllyasviel/control_v11p_sd15_canny."
        )


def check_size(config: GenerateConfig) -> None:
    """Raises UserError where flags tell the pictures' size in part, or twice."""
    if (config.height is None) != (config.width is None):
        raise UserError("--height and --width go together: give both, or --resolution for square pictures.")
    if config.height is not None and config.resolution is not None:
        raise UserError("--resolution is about square pictures: leave it out, or --height and --width.")


def _check_what_is_needed(config: GenerateConfig) -> None:
    check_controlnet_is_named(config)
    if config.conditioning_image is None:
        raise UserError("--conditioning_image is missing: name the condition images, or a folder with them.")
    if config.prompt is None and config.prompt_file is None:
        raise UserError("--prompt is missing: say what to draw; --prompt '' is an empty one.")
    if config.prompt is not None and config.prompt_file is not None:
        raise UserError("--prompt and --prompt_file both say what to draw: keep one of them.")


def check_what_goes_together(config: GenerateConfig) -> None:
    """Raises UserError for values that mean nothing beside each other."""
    controlnets = len(config.controlnet_model_name_or_path or ())
    for name in OF_EACH_CONTROLNET:
        values = getattr(config, name) or ()
        if len(values) > 1 and len(values) != controlnets:
            raise UserError(
                f"--{name} has {len(values)} values, and --controlnet_model_name_or_path names {controlnets}: give as "
                "many, or one for all."
            )
    starts_and_ends = map(config.of_each_controlnet, ("control_guidance_start", "control_guidance_end"))
    for start, end in zip(*starts_and_ends, strict=True):
        if start >= end:
            raise UserError(
                f"--control_guidance_start is {start} and --control_guidance_end {end}: expected a start before the "
                "end."
            )
    if config.negative_prompt is not None and not config.is_guided:
        raise UserError(
            f"--negative_prompt has no effect at --guidance_scale {config.guidance_scale}, which is no guidance: give "
            "more than 1, or leave it out."
        )
