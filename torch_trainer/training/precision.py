"""Layers that rest in float32 and compute in the dtype of what they are given.

What autocast does for matrix products alone, here for normalisation too, as the Flax backend does: under autocast a
ControlNet's normalised activations are float32, which takes twice the memory and a conversion before every product.
Statistics are summed in float32 by PyTorch's kernels either way.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *_parameters_like(input, self))


class _Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _parameters_like(input, self)
        assert weight is not None
        return self._conv_forward(input, weight, bias)


class _GroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, *_parameters_like(input, self), self.eps)


class _LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, *_parameters_like(input, self), self.eps)


def _parameters_like(input: Tensor, layer: Any) -> tuple[Any, Any]:
    weight, bias = layer.weight, layer.bias
    return tuple(None if param is None else param.to(input.dtype) for param in (weight, bias))  # type: ignore[return-value]


_COMPUTING_LIKE_THEIR_INPUT: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    nn.Conv2d: _Conv2d,
    nn.GroupNorm: _GroupNorm,
    nn.LayerNorm: _LayerNorm,
}


def compute_in_dtype_of_input(model: nn.Module) -> None:
    """Let every layer of `model` with parameters to train compute so. The parameters and their names stay."""
    for layer in model.modules():
        if any(param.requires_grad for param in layer.parameters(recurse=False)):
            layer.__class__ = _COMPUTING_LIKE_THEIR_INPUT[type(layer)]
