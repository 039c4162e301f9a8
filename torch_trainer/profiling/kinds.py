"""Which kind of work an operation or a kernel does, by its name."""

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

# Whatever an operation of such a kind calls belongs to it; one of another kind may call anything.
WHOLE: frozenset[Kind] = frozenset({"convolutions", "attention", "matrix products", "normalisation", "collectives"})

_Patterns = list[tuple[re.Pattern[str], Kind]]


def _patterns(*rows: tuple[str, Kind]) -> _Patterns:
    return [(re.compile(pattern, re.IGNORECASE), kind) for pattern, kind in rows]


# Names of PyTorch's operations behind "aten::", of its native functions. The first that matches counts.
_OPERATIONS = _patterns(
    (r"attention|softmax", "attention"),
    (r"(group|layer|batch|instance|rms)_norm", "normalisation"),
    (r"conv", "convolutions"),
    (r"(linear\w*|matmul|\w*mm|mv|dot|einsum|_addmm_activation)$", "matrix products"),
    (r"(to|_?to_copy|copy_?|clone|contiguous|cat|stack|(constant_)?pad(_nd)?|repeat)$", "copies"),
    (r"(zero|fill)_$|(zeros|ones|full)(_like)?$", "copies"),
    (r"empty|view|reshape|(un)?squeeze|expand|strided|transpose|permute|split|chunk|slice|select|narrow", "other"),
    (r"(t|resize_|resize_as_|detach|alias|item|_local_scalar_dense|result_type|lift_fresh|resolve_\w+)$", "other"),
    (r"", "elementwise"),
)
_COLLECTIVES = re.compile(r"(c10d|nccl|gloo|oneccl|xccl)\b", re.IGNORECASE)

# Names of kernels of PyTorch, cuDNN, cuBLAS, CUTLASS, xFormers, bitsandbytes and NCCL. Those that several libraries
# use for several kinds ("gemm" stands in the names of cuDNN's convolutions too) are distinguished by the order.
_KERNELS = _patterns(
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
_FUSED = _patterns(
    (r"attention|softmax", "attention"),
    (r"(group|layer|batch|rms)_norm|var_mean", "normalisation"),
    (
        r"^(_|to_copy|clone|cat|copy|permute|transpose|t|view|unsafe_view|expand|constant_pad_nd|split|slice|unsqueeze|"
        r"squeeze|zeros|full)+$",
        "copies",
    ),
    (r"", "elementwise"),
)
_TEMPLATES = _patterns((r"attention", "attention"), (r"conv", "convolutions"), (r"", "matrix products"))


def kind_of_operation(name: str) -> Kind:
    """Of an operation on the host, such as "aten::conv2d"; those of autograd itself are "other"."""
    if _COLLECTIVES.match(name):
        return "collectives"
    namespace, separator, function = name.rpartition("::")
    if not separator or namespace == "autograd::engine" or namespace.startswith("torch"):
        return "other"
    return _first(_OPERATIONS, function) or "other"


def kind_of_kernel(name: str) -> Kind | None:
    """Of a kernel or copy on a device; None where the name says nothing."""
    compiled = _INDUCTOR.match(name)
    if compiled is None:
        return _first(_KERNELS, name)
    return _first(_TEMPLATES if compiled["shape"] == "tem" else _FUSED, compiled["fused"])


def _first(patterns: _Patterns, name: str) -> Kind | None:
    return next((kind for pattern, kind in patterns if pattern.search(name)), None)
