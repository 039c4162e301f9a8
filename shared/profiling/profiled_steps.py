"""Which steps of a run `--profile_steps` means."""

import logging

from shared.config import TrainConfig
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

# The first step may compile, and the allocator settles in the second.
_WARM_UP_STEPS = 2


def profiled_steps(config: TrainConfig, first_step: int, last_step: int) -> range:
    """The optimizer steps to profile, counted from 1, of a run from `first_step` (exclusive) to `last_step`.

    None where a continued run has too few left: the same command must be able to finish what it began.

    Raises:
        UserError: the run would end before they do.
    """
    if config.profile_steps == 0:
        return range(0)
    needed = _WARM_UP_STEPS + config.profile_steps
    if last_step - first_step >= needed:
        begin = first_step + 1 + _WARM_UP_STEPS
        return range(begin, begin + config.profile_steps)
    if first_step == 0:
        raise UserError(
            f"--profile_steps {config.profile_steps} needs a run of {needed} steps, because the first "
            f"{_WARM_UP_STEPS} are not like the others and left out; this one has {last_step}. Lower --profile_steps "
            "or raise --max_train_steps."
        )
    logger.warning(
        "--profile_steps %d: nothing is profiled, for %d steps are left and %d would be needed",
        *(config.profile_steps, last_step - first_step, needed),
    )
    return range(0)
