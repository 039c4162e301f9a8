"""How a network computes what it computes, and what its backward pass keeps of the forward pass (Chen et al. 2016)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import jax

from flax_trainer.models.kernels.attention import AttentionKernel
from flax_trainer.models.kernels.convolution import CONVOLUTION

CheckpointingPolicy = Literal["everything", "all_but_products"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Compute:
    """Given to a model when it is made; results differ by rounding alone.

    Attributes:
        attention: see `dot_product_attention`.
        tpu_convolutions: in the forms that suit a TPU (see `kernels/convolution.py`); other devices are slower with
            them.
        fused_feed_forward: narrow transformers' feed-forward networks as a kernel for TPUs (see
            `kernels/feed_forward.py`), in bfloat16.
        checkpointing: keep less for the backward pass, which then recomputes one layer after another (see
            `checkpointed`). It has no effect where no gradient passes, as in a frozen UNet down to its mid block.
        gpu_normalisation: in the form that suits a GPU (see `kernels/normalisation.py`).
    """

    attention: AttentionKernel = "plain"
    tpu_convolutions: bool = False
    checkpointing: CheckpointingPolicy | None = None
    gpu_normalisation: bool = False
    fused_feed_forward: bool = False


PLAINLY = Compute()


def checkpointed(function: Callable[..., Result], policy: CheckpointingPolicy | None) -> Callable[..., Result]:
    """The same function, whose gradient recomputes what happens inside it. Where none is taken, nothing changes.

    Args:
        function: of arrays; modules and whatever else it uses may be closed over.
        policy: what is recomputed; the results are the same. "everything" keeps only the arguments.
            "all_but_products" also keeps the results of linear layers and convolutions, which cost the most to
            compute, and recomputes normalisation, activations and attention scores, which cost the most to keep.
            None leaves the function as it is.
    """
    return function if policy is None else jax.checkpoint(function, policy=_POLICIES[policy])


_POLICIES: dict[CheckpointingPolicy, Callable[..., bool]] = {
    "everything": jax.checkpoint_policies.nothing_saveable,
    # A product of attention has the batch and the heads for batch dimensions; one with weights has none.
    "all_but_products": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(CONVOLUTION),
    ),
}
