"""Which kind of work an operation of PyTorch does, by its name."""

import re

from shared.profiling.kinds import Kind, first, patterns

# Whatever an operation of such a kind calls belongs to it; one of another kind may call anything.
WHOLE: frozenset[Kind] = frozenset({"convolutions", "attention", "matrix products", "normalisation", "collectives"})

# Names of PyTorch's operations behind "aten::", of its native functions. The first that matches counts.
_OPERATIONS = patterns(
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


def kind_of_operation(name: str) -> Kind:
    """Of an operation on the host, such as "aten::conv2d"; those of autograd itself are "other"."""
    if _COLLECTIVES.match(name):
        return "collectives"
    namespace, separator, function = name.rpartition("::")
    if not separator or namespace == "autograd::engine" or namespace.startswith("torch"):
        return "other"
    return first(_OPERATIONS, function) or "other"
