"""Names of PyTorch's operations."""

import pytest

from torch_trainer.profiling.kinds import kind_of_operation


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::conv2d", "convolutions"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("xformers::efficient_attention_forward_cutlass", "attention"),
        ("aten::linear", "matrix products"),
        ("aten::baddbmm", "matrix products"),
        ("aten::native_group_norm_backward", "normalisation"),
        ("aten::linalg_vector_norm", "elementwise"),
        ("aten::silu", "elementwise"),
        ("aten::copy_", "copies"),
        ("aten::_to_copy", "copies"),
        ("aten::zeros", "copies"),
        ("aten::view", "other"),
        ("aten::empty_strided", "other"),
        ("c10d::allreduce_", "collectives"),
        ("gloo:all_reduce", "collectives"),
        ("ConvolutionBackward0", "other"),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", "other"),
        ("torch::autograd::AccumulateGrad", "other"),
    ],
)
def test_operations(name: str, kind: str) -> None:
    assert kind_of_operation(name) == kind
