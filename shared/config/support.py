"""What each backend does not do yet, and what it does in its own way, as the flags' declarations say."""

from collections.abc import Mapping
from typing import Any

from shared.config.flags import Backend, Equivalent, Flag, Missing
from shared.config.options import FLAGS, TrainConfig
from shared.user_errors import UserError

BACKEND_NAMES: dict[Backend, str] = {"flax": "Flax", "torch": "PyTorch"}


def missing_in(backend: Backend) -> dict[str, Missing]:
    """What a backend does not implement yet, by flag."""
    found = {name: flag.in_backend(backend) for name, flag in FLAGS.items()}
    return {name: fact for name, fact in found.items() if isinstance(fact, Missing)}


def check_support(config: TrainConfig, backend: Backend) -> None:
    """Raise UserError for the first flag that `backend` does not implement yet, with what to do instead."""
    for name, missing in missing_in(backend).items():
        if _is_asked_for(missing, FLAGS[name], getattr(config, name)):
            value = f" {missing.value}" if missing.value is not None else ""
            raise UserError(
                f"--{name}{value} is not supported yet by the {BACKEND_NAMES[backend]} backend: {missing.advice}"
            )


def notices(config: Any, backend: Backend, flags: Mapping[str, Flag] = FLAGS) -> list[str]:
    """One line for each flag given that `backend` honours in another way than literally."""
    found = {name: flag.in_backend(backend) for name, flag in flags.items()}
    return [
        f"--{name}: {fact.notice}."
        for name, fact in found.items()
        if isinstance(fact, Equivalent) and getattr(config, name) != flags[name].default
    ]


def _is_asked_for(missing: Missing, flag: Flag, given: Any) -> bool:
    return bool(given == missing.value if missing.value is not None else given != flag.default)
