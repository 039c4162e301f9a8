"""A program of a backend takes over where models work: `cache`, and conditions and captions that a model makes."""

import importlib.util
import os
import sys
from collections.abc import Sequence

from shared.config.flags import Backend
from shared.outgoing.redaction import described
from shared.prepare_data.options import CacheOptions
from shared.user_errors import UserError

_NEEDED: dict[Backend, str] = {"flax": "jax", "torch": "torch"}
_FLAG = "--backend"


def run(words: Sequence[str]) -> int:
    """Does not return, unless the backend is not there."""
    options, rest = taken_apart(words)
    program = f"{_backend(options)}_trainer.cache_data"
    os.execv(sys.executable, [sys.executable, "-m", program, *rest])


def hand_to_torch(words: Sequence[str]) -> int:
    """Does not return, unless PyTorch is not there.

    Args:
        words: of the whole command line, the subcommand's name first.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "Models that make conditions and captions run in PyTorch, which is not installed. Run: pip install torch "
            "(the CPU build is enough where there is no GPU)"
        )
    os.execv(sys.executable, [sys.executable, "-m", "torch_trainer.prepare_data", *words])


def taken_apart(words: Sequence[str]) -> tuple[CacheOptions, list[str]]:
    """The subcommand's own flag, and the words for the program.

    Raises:
        UserError: there is no such backend.
    """
    rest, named = list(words), None
    while place := next((place for place, word in enumerate(rest, 1) if word.partition("=")[0] == _FLAG), 0):
        _, equals, value = rest.pop(place - 1).partition("=")
        named = value if equals else rest.pop(place - 1) if place <= len(rest) else ""
    match named:
        case None | "flax" | "torch":
            return CacheOptions(named), rest
    raise UserError(f"{_FLAG} is {described(named)}: expected flax or torch, or leave it out.")


def _backend(options: CacheOptions) -> Backend:
    installed = [name for name, package in _NEEDED.items() if importlib.util.find_spec(package) is not None]
    if options.backend is None and installed:
        return installed[0]
    if options.backend is None or options.backend not in installed:
        named = f"{_FLAG} {options.backend}" if options.backend else "cache"
        raise UserError(f"{named} needs its packages: pip install -r requirements_flax.txt, or requirements.txt.")
    return options.backend
