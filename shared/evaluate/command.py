"""From the words of a command line to an evaluation."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from shared.config import Backend
from shared.config.arguments import read_values
from shared.config.help_text import command_help
from shared.config.validation import check_output_dir, check_values
from shared.evaluate.options import EVALUATE_FLAGS, EvaluateConfig
from shared.generate.command import check_controlnet_is_named, check_size, check_what_goes_together
from shared.outgoing.messages import set_up_logging
from shared.run.interruption import exit_code_of
from shared.user_errors import UserError

if TYPE_CHECKING:
    from shared.generate.pictures import Artist
    from shared.generate.preparation import Commission

_INTRODUCTION = (
    "Draws a picture for every held-out pair with a trained ControlNet, and measures the pictures. "
    "--controlnet_model_name_or_path, --eval_data and --metrics are needed; the base model too, where the ControlNet "
    "is not the folder of a training run. Stopped at any time, the same command goes on where it was."
)


def evaluate_by_command(words: Sequence[str], backend: Backend, make_artist: "Callable[[Commission], Artist]") -> int:
    """0: the figures are there; 2: a mistake of the user, told in a sentence; 130: Ctrl-C; 1: a defect.

    `make_artist` loads the models, and the backend's libraries: other mistakes need not wait for them.
    """
    return exit_code_of(
        partial(_evaluate, words, backend, make_artist),
        interrupted="Interrupted. What is drawn and measured is kept: the same command goes on from there.",
    )


def _evaluate(words: Sequence[str], backend: Backend, make_artist: "Callable[[Commission], Artist]") -> int:
    if {"-h", "--help"} & set(words):
        print_help(backend)
        return 0
    config = read_command(words)
    from shared.evaluate.evaluating import evaluate  # here, so that mistakes in flags need not wait for libraries
    from shared.evaluate.preparation import prepare_evaluation

    set_up_logging(f"{backend}_trainer")
    evaluate(prepare_evaluation(config, backend), make_artist)
    return 0


def print_help(backend: Backend) -> None:
    """On stdout."""
    sys.stdout.write(command_help(f"python3 -m {backend}_trainer.evaluate", _INTRODUCTION, EVALUATE_FLAGS, backend))


def read_command(words: Sequence[str]) -> EvaluateConfig:
    """What the words after the program's name ask for; no file is read.

    Raises:
        UserError: for the first mistake found.
    """
    config = EvaluateConfig(**read_values(words, EVALUATE_FLAGS))
    check_values(config, EVALUATE_FLAGS)
    check_output_dir(config.output_dir)
    _check_what_is_needed(config)
    check_size(config.generation())
    check_what_goes_together(config.generation())
    return config


def _check_what_is_needed(config: EvaluateConfig) -> None:
    check_controlnet_is_named(config.generation())
    if config.eval_data is None:
        raise UserError(
            "--eval_data is missing: name pairs that were not trained on, a folder or shards whose names end in .tar."
        )
    if config.metrics is None:
        raise UserError(
            f"--metrics is missing: say what to measure, of {', '.join(EVALUATE_FLAGS['metrics'].choices)}."
        )
    twice = next((name for name in config.metrics if config.metrics.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--metrics names {twice} twice: name each once.")
