"""Which kind of work a kernel or a copy does, by its name."""

import re
from typing import Literal, get_args

Kind = Literal[
    "convolutions",
    "attention",
    "matrix products",
    "normalisation",
    "elementwise",
    "copies",
    "optimizer",
    "collectives",
    "other",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

Patterns = list[tuple[re.Pattern[str], Kind]]


def patterns(*rows: tuple[str, Kind]) -> Patterns:
    return [(re.compile(pattern, re.IGNORECASE), kind) for pattern, kind in rows]


# Names of kernels of PyTorch, cuDNN, cuBLAS, CUTLASS, xFormers, bitsandbytes and NCCL. Those that several libraries
# use for several kinds ("gemm" stands in the names of cuDNN's convolutions too) are distinguished by the order.
_KERNELS = patterns(
    (r"nccl|rccl", "collectives"),
    (r"flash|fmha|sdpa|attention|attn|softmax", "attention"),
    (
        r"(group|layer|batch|rms)_?norm|moments|welford|gammabeta|bn_[fb]w|fusedparams|internalgradients",
        "normalisation",
    ),
    (r"multi_tensor|adam|optimizer", "optimizer"),
    (r"nchwTo|nhwcTo|AddPadding|convertTensor", "copies"),
    (r"fprop|dgrad|wgrad|convol|conv\d?d|conv_|cudnn|winograd|im2col|col2im|miopen", "convolutions"),
    (r"gemm|gemv|cublas|cutlass|nvjet|splitK|matmul|(^|_)mm(_|$)|Cijk_", "matrix products"),
    (r"copy|memcpy|memset|FillFunctor|transpose|permute", "copies"),
    (r"elementwise|pointwise|vectorized|unrolled|reduce|upsample|index|gather|scatter|distribution", "elementwise"),
)

# Inductor names a kernel by its shape (pointwise, reduction, persistent reduction, template, …) and what is fused in
# it: triton_poi_fused_add_convolution_silu_3.
_INDUCTOR = re.compile(r"triton_(?P<shape>[a-z]+)_fused_?(?P<fused>\w*?)_?\d*$")
_FUSED = patterns(
    (r"attention|softmax", "attention"),
    (r"(group|layer|batch|rms)_norm|var_mean", "normalisation"),
    (
        r"^(_|to_copy|clone|cat|copy|permute|transpose|t|view|unsafe_view|expand|constant_pad_nd|split|slice|unsqueeze|"
        r"squeeze|zeros|full)+$",
        "copies",
    ),
    (r"", "elementwise"),
)
_TEMPLATES = patterns((r"attention", "attention"), (r"conv", "convolutions"), (r"", "matrix products"))


def kind_of_kernel(name: str) -> Kind | None:
    """Of a kernel or copy on a device; None where the name says nothing."""
    compiled = _INDUCTOR.match(name)
    if compiled is None:
        return first(_KERNELS, name)
    return first(_TEMPLATES if compiled["shape"] == "tem" else _FUSED, compiled["fused"])


def first(of: Patterns, name: str) -> Kind | None:
    return next((kind for pattern, kind in of if pattern.search(name)), None)
