"""The state that a run continues from, whichever backend saved it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints, check_same_arrays
from flax_trainer.checkpoints.torch_checkpoint import is_torch_checkpoint, read_torch_checkpoint, read_torch_record
from flax_trainer.training.state import TrainState
from shared.checkpoints.policy import check_resumable, checkpoint_step


def restore(checkpoint: Path, fresh: TrainState, record: dict[str, Any], layouts: Mapping[str, str]) -> TrainState:
    """The state of a checkpoint, numpy.

    Args:
        fresh: what the run would begin with: the names, shapes and dtypes expected.
        record: what this run's checkpoints say about it, which the checkpoint's own must match.
        layouts: of what may be trained (`ModelDefs.trained_layouts`).

    Raises:
        UserError: the checkpoint is damaged, or of another run.
    """
    if is_torch_checkpoint(checkpoint):
        check_resumable(checkpoint, read_torch_record(checkpoint), record)
        state, _ = read_torch_checkpoint(checkpoint, layouts, fresh)
        state = state.with_loss_scaler_of(fresh)
        check_same_arrays(checkpoint, state, fresh)
        return state
    checkpoints = Checkpoints(checkpoint.parent, keep=None, read_only=True)
    step = checkpoint_step(checkpoint)
    check_resumable(checkpoint, checkpoints.record(step), record)
    return checkpoints.restore(step, fresh)
