"""`python3 -m flax_trainer.cache_data` and `python3 -m torch_trainer.cache_data`: from words to a cache."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from shared.config import Backend, TrainConfig, read_configuration, validate
from shared.config.options import FLAGS
from shared.config.validation import check_one_view
from shared.outgoing.messages import set_up_logging
from shared.run.interruption import exit_code_of
from shared.user_errors import UserError

if TYPE_CHECKING:
    from shared.prepare_data.cache.encoders import Encoders

_HELP = """usage: python3 -m {backend}_trainer.cache_data --flag value ...

Encodes images and captions once, with a base model's VAE and text encoders, for --cached_data.

Takes the flags of train_{backend}.py (see its --help). Those that say what a step sees matter: the base model, the
data and their columns or keys, --resolution and how pictures are resized to it, --conditioning_channels,
--mixed_precision (the format of what is kept), --max_train_samples. --output_dir is the folder of the cache; work that
was stopped is taken up there. --validation_prompt, where it is known already, is encoded too.
"""


def cache_by_command(words: Sequence[str], backend: Backend, open_encoders: "Callable[[TrainConfig], Encoders]") -> int:
    """0: the cache is made; 2: a mistake of the user, told in a sentence; 130: Ctrl-C; 1: a defect."""
    goes_on = "Interrupted. The same command goes on where it was stopped."
    return exit_code_of(partial(_cache, words, backend, open_encoders), interrupted=goes_on)


def _cache(words: Sequence[str], backend: Backend, open_encoders: "Callable[[TrainConfig], Encoders]") -> int:
    if {"-h", "--help"} & set(words):
        sys.stdout.write(_HELP.format(backend=backend))
        return 0
    config = read_command(words, backend)
    from shared.prepare_data.cache.making import (
        make_cache,  # here, so that mistakes in flags need not wait for libraries
    )

    set_up_logging(f"{backend}_trainer")
    make_cache(config, backend, open_encoders)
    return 0


def read_command(words: Sequence[str], backend: Backend) -> TrainConfig:
    """What the words after the program's name ask for; no file but that of --config is read.

    Raises:
        UserError: for the first mistake found.
    """
    config = read_configuration(words)
    if config.output_dir == FLAGS["output_dir"].default:
        raise UserError("--output_dir is missing: name the folder of the cache.")
    if config.cached_data is not None:
        raise UserError("--cached_data names a cache that is made already: name the data that one is to be made of.")
    check_one_view(config, "A cache holds one view of each picture")
    validate(config, backend)
    return config
