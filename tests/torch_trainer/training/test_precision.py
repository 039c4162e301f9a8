"""Layers that rest in float32 and compute in the dtype of their input."""

import copy

import pytest
import torch
from diffusers import ControlNetModel
from torch import nn

from torch_trainer.training.precision import compute_in_dtype_of_input


def layers() -> list[tuple[nn.Module, torch.Tensor]]:
    """Each kind of layer with parameters, and an input in bf16."""
    random = torch.Generator().manual_seed(0)
    maps_BCHW = torch.randn((2, 8, 6, 6), generator=random).bfloat16()
    states_BLD = torch.randn((2, 5, 8), generator=random).bfloat16()
    return [
        (nn.Conv2d(8, 4, 3, stride=2, padding=1), maps_BCHW),
        (nn.Conv2d(8, 4, 1, bias=False), maps_BCHW),
        (nn.GroupNorm(4, 8, eps=1e-4), maps_BCHW),
        (nn.Linear(8, 6), states_BLD),
        (nn.Linear(8, 6, bias=False), states_BLD),
        (nn.LayerNorm(8, eps=1e-4), states_BLD),
    ]


@pytest.mark.parametrize("index", range(len(layers())))
def test_a_layer_is_the_same_layer_with_its_weights_rounded(index: int) -> None:
    """Output, and the gradients, which arrive in float32."""
    layer, states = layers()[index]
    rounded = copy.deepcopy(layer).bfloat16()
    compute_in_dtype_of_input(layer)
    output, expected = layer(states), rounded(states)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    for result in (output, expected):
        result.float().square().sum().backward()
    for (name, param), reference in zip(layer.named_parameters(), rounded.parameters(), strict=True):
        assert param.dtype == param.grad.dtype == torch.float32, name  # type: ignore[union-attr]
        assert reference.grad is not None
        assert torch.equal(param.grad, reference.grad.float()), name  # type: ignore[arg-type]


def test_a_whole_controlnet_computes_so_and_keeps_its_names() -> None:
    sizes = {"block_out_channels": (32, 64), "cross_attention_dim": 16, "attention_head_dim": 4}
    blocks = ("CrossAttnDownBlock2D", "DownBlock2D")
    controlnet = ControlNetModel(down_block_types=blocks, layers_per_block=1, **sizes)
    names = [name for name, _ in controlnet.named_parameters()]
    compute_in_dtype_of_input(controlnet)
    assert [name for name, _ in controlnet.named_parameters()] == names
    dtypes = set()
    for module in controlnet.modules():
        module.register_forward_hook(lambda module, inputs, output: dtypes.add(getattr(output, "dtype", None)))
    down, mid = controlnet(
        torch.randn(1, 4, 8, 8).bfloat16(),
        torch.tensor([10]),
        torch.randn(1, 7, 16).bfloat16(),
        torch.randn(1, 3, 64, 64).bfloat16(),
        return_dict=False,
    )
    assert {residual.dtype for residual in (*down, mid)} == {torch.bfloat16}
    assert dtypes - {None} == {torch.bfloat16, torch.float32}, "float32 is that of the sinusoids"


def test_layers_that_are_not_trained_stay_as_they_are() -> None:
    layer = nn.Linear(8, 6).bfloat16().requires_grad_(False)
    compute_in_dtype_of_input(layer)
    assert type(layer) is nn.Linear
