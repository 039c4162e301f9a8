"""The batches of a training's steps, which several processes may take together."""

import numpy as np

from shared.data.batches import Batch, BatchLoader
from shared.data.views import Size
from shared.user_errors import UserError


class JointBatches:
    """A loader's batches, one for each step.

    One of several processes must not leave the others waiting in the middle of a step when its data fail. Its batches
    then go on with noise that is no number. So the loss, which is over all processes, is none either: all find that out
    with the figures of the same step, which has changed nothing, and can save together what was before it.
    """

    def __init__(self, loader: BatchLoader, first: int, *, is_one_of_several: bool):
        """`first` is the step of the first batch, counted from 0."""
        self._error: ValueError | None = None
        self._failed_step = 0
        self._loader, self._batches = loader, loader.iterate(first)
        sizes = loader.sizes if is_one_of_several else []
        self._blank = {size: loader.blank(size) for size in sizes}  # while what makes them is known to work

    def next(self, step: int) -> Batch:
        """The batch of a step; to be asked for in order.

        Raises:
            UserError: the data fail, and no other process waits for this one.
        """
        if self._error is None:
            try:
                return next(self._batches)[1]
            except ValueError as error:
                if not self._blank:
                    raise
                self._error, self._failed_step = error, step + 1
        return without_finite_loss(self._blank[self.size_of(step)])

    def size_of(self, step: int) -> Size:
        """(width, height) of the pictures of a step."""
        return self._loader.size_of(step)

    def have_failed(self, step: int) -> bool:
        """Whether the data of this process, one of several, were not there for this step, counted from 1."""
        return self._error is not None and self._failed_step <= step

    def failure(self, step: int, *, is_saved: bool = True) -> ValueError:
        """What to end with when the data of a process have failed in this step, counted from 1.

        `is_saved` says whether what was trained before it is.
        """
        if self._error is not None:
            return self._error
        kept = f"What was trained until step {step - 1} is saved" if step > 1 else "Nothing was trained yet"
        if not is_saved:
            kept = "What was trained since the newest checkpoint is lost"
        return UserError(
            f"Another process of this run met data that it cannot use in step {step}; its own output says which. "
            f"{kept}: when the data are mended, start the same command again on all hosts, with "
            "--resume_from_checkpoint latest."
        )


def without_finite_loss(batch: Batch) -> Batch:
    """A batch of these names, shapes and dtypes whose loss is not a number, whatever the models."""
    return {name: np.full_like(array, np.nan if name == "noise" else 0) for name, array in batch.items()}
