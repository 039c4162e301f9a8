"""Metrics whose models run in PyTorch, whichever backend draws."""

import importlib.util

from shared.user_errors import UserError


def check_torch(metric: str, *more: str) -> None:
    """Raises UserError where PyTorch, or a package beside it, is not installed.

    A TPU VM has none: its CPU build is enough there, and the chips stay JAX's.
    """
    missing = [name for name in ("torch", *more) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--metrics {metric} looks at pictures with a model in PyTorch, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed. Run: pip install {' '.join(missing)} (where there "
            "is no NVIDIA GPU, with --extra-index-url https://download.pytorch.org/whl/cpu)"
        )
