"""The floating-point operations that training a ControlNet takes, whatever a backend spends on top of them.

Counted are the same as by `flax_trainer.profiling.model_flops`: the multiplications and additions of matrix products
and convolutions in the gradient of one image's loss with respect to what is trained, without the frozen encoders and
what is computed a second time to save memory (Chowdhery et al. 2022, PaLM, appendix B).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.utils._python_dispatch import TorchDispatchMode

from shared.data.batches import Batch
from torch_trainer.base_models import BaseModels, Prompt, silence_down_residuals
from torch_trainer.training.step import predict


@dataclass(frozen=True)
class ModelShapes:
    """What of the models and the batches decides how much there is to compute."""

    controlnet: type[Any]
    controlnet_config: Any
    unet: type[Any]
    unet_config: Any
    trained_in_unet: frozenset[str]  # names of parameters
    only_mid_control: bool
    latent_shape: tuple[int, int, int]  # H, W, C
    condition_shape: tuple[int, int, int]  # H, W, C
    text_shape: tuple[int, int]  # L, D
    added_shapes: dict[str, tuple[int, ...]]  # SDXL's conditions besides the text

    @classmethod
    def of(cls, models: BaseModels, blank: Batch, *, only_mid_control: bool) -> "ModelShapes":
        """Of models that are not yet prepared for training, and of a batch whose arrays begin with [A, B]."""
        unet = models.unet.config
        added = {}
        if "time_ids" in blank:
            sizes_shape = blank["time_ids"].shape[2:]
            pooled = unet.projection_class_embeddings_input_dim - sizes_shape[0] * unet.addition_time_embed_dim
            added = {"text_embeds": (pooled,), "time_ids": sizes_shape}
        text = blank["prompt_embeds"] if "prompt_embeds" in blank else blank["input_ids"]
        return cls(
            controlnet=type(models.controlnet),
            controlnet_config=models.controlnet.config,
            unet=type(models.unet),
            unet_config=unet,
            trained_in_unet=frozenset(name for name, param in models.unet.named_parameters() if param.requires_grad),
            only_mid_control=only_mid_control,
            latent_shape=blank["noise"].shape[2:],
            condition_shape=blank["conditioning_pixel_values"].shape[2:],
            text_shape=(text.shape[2], unet.cross_attention_dim),
            added_shapes=added,
        )


def model_flops_per_image(shapes: ModelShapes) -> float:
    """FLOPs of one image in one training step; a multiplication and an addition are two.

    Nothing is computed: the tensors are on PyTorch's meta device and have no values. It takes seconds for a full-size
    model, and touches nothing that other threads use.
    """
    with torch.device("meta"):
        models = _models(shapes)
        (height, width, channels), (length, features) = shapes.latent_shape, shapes.text_shape
        condition_height, condition_width, condition_channels = shapes.condition_shape
        added = {name: torch.empty(1, *shape) for name, shape in shapes.added_shapes.items()}
        inputs = (
            torch.empty(1, channels, height, width),
            torch.empty(1, dtype=torch.int64),
            Prompt(torch.empty(1, length, features), added or None),
            torch.empty(1, condition_channels, condition_height, condition_width),
        )
        return flops_of(lambda: predict(models, *inputs).square().mean().backward())


def flops_of(function: Callable[[], object]) -> float:
    """FLOPs of the matrix products and convolutions that a call computes, in backward passes too.

    Attention counts where it consists of products, and not where it is an operation of its own.
    """
    counter = _Counter()
    with counter:
        function()
    return counter.flops


def _models(shapes: ModelShapes) -> BaseModels:
    """The same ones without weights, and with attention that computes its scores once and keeps them."""
    controlnet = shapes.controlnet.from_config(shapes.controlnet_config).train()
    unet = shapes.unet.from_config(shapes.unet_config).eval()
    for name, param in unet.named_parameters():
        param.requires_grad_(name in shapes.trained_in_unet)
    if shapes.only_mid_control:
        silence_down_residuals(controlnet)
    for model in (controlnet, unet):
        model.set_attn_processor(AttnProcessor())
    return BaseModels(controlnet, unet, None, None, torch.float32, bool(shapes.trained_in_unet))


@dataclass
class _Counter(TorchDispatchMode):
    """Sees every operation of its thread. (`torch.utils.flop_counter` puts hooks on the modules of all threads.)"""

    flops: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = _COUNTS.get(func.overloadpacket)
        if count is not None:
            self.flops += 2.0 * count(result, *args)
        return result


def _product(result: torch.Tensor, left: torch.Tensor, *_: Any) -> int:
    """Multiplications of [.., n, k] · [.., k, m]."""
    return result.numel() * left.shape[-1]


def _sum_with_product(result: torch.Tensor, summand: torch.Tensor, left: torch.Tensor, *_: Any) -> int:
    return _product(result, left)


def _convolution(result: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, *_: Any) -> int:
    """An output element is a sum over the kernel's window and input channels."""
    return result.numel() * weight[0].numel()


def _convolution_backward(_: Any, grad: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, *more: Any) -> int:
    """The gradients by the input and by the weights take as many products as the convolution, where they are asked for.

    The last argument says which of the three (that by the bias is a sum) are.
    """
    by_input, by_weight, _ = more[-1]
    return (by_input + by_weight) * _convolution(grad, states, weight)


_COUNTS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mm: _product,
    torch.ops.aten.bmm: _product,
    torch.ops.aten.addmm: _sum_with_product,
    torch.ops.aten.baddbmm: _sum_with_product,
    torch.ops.aten.convolution: _convolution,
    torch.ops.aten.convolution_backward: _convolution_backward,
}
