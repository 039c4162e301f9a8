"""The moving average of the trained weights (`--use_ema`)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class WeightAverage:
    """diffusers' `EMAModel` with its defaults, by parameter names. `means` are float32, on the parameters' device."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]):
        self._parameters = parameters
        self._steps = 0
        self.means = {name: param.detach().clone() for name, param in parameters.items()}

    @torch.no_grad()
    def update(self, non_finite: torch.Tensor) -> None:
        """Take in the parameters after an optimizer step, unless `non_finite` (float32 [], 0 or 1) is 1.

        The first step's replace the average, then it decays by min(0.9999, step / (step + 9)).
        """
        self._steps += 1
        share_of_new = (1.0 if self._steps == 1 else max(9 / (self._steps + 9), 1e-4)) * (1 - non_finite)
        for name, mean in self.means.items():
            mean.sub_(share_of_new * (mean - self._parameters[name]))

    def load(self, means: Mapping[str, torch.Tensor], steps: int) -> None:
        """Continue from these, after so many steps."""
        for name, mean in self.means.items():
            mean.copy_(means[name])
        self._steps = steps

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the models compute with the average. Without a copy of anything: both exchange their memory."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, param in self._parameters.items():
            param.data, self.means[name] = self.means[name], param.data
