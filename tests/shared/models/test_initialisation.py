"""Initial values: reproducible, independent of order, and distributed as PyTorch's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.models.initialisation import ModuleKind, initial_values

CONV = {"weight": (64, 32, 3, 3), "bias": (64,)}


def test_values_of_a_name_are_fixed():
    """Other values would make every recorded run incomparable with those to come."""
    values = initial_values(0, "conv_in", ModuleKind.AFFINE, {"weight": (2, 2), "bias": (2,)})
    np.testing.assert_allclose(values["weight"], [[-0.52721328, -0.37332785], [0.06058423, -0.09102352]], rtol=1e-6)
    np.testing.assert_allclose(values["bias"], [-0.50831312, -0.66605651], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63 - 1), st.text(min_size=1, max_size=20), st.sampled_from(ModuleKind))
def test_values_depend_on_seed_and_name_alone(seed, name, kind):
    shapes = {"weight": (4, 6), "bias": (4,)}
    values = initial_values(seed, name, kind, shapes)
    again = initial_values(seed, name, kind, dict(reversed(shapes.items())))
    assert values.keys() == shapes.keys()
    for key, value in values.items():
        assert value.dtype == np.float32
        assert value.shape == shapes[key]
        np.testing.assert_array_equal(value, again[key])
    if kind in (ModuleKind.AFFINE, ModuleKind.EMBEDDING):
        assert not np.array_equal(values["weight"], initial_values(seed + 1, name, kind, shapes)["weight"])
        assert not np.array_equal(values["weight"], initial_values(seed, name + "x", kind, shapes)["weight"])


@pytest.mark.parametrize(
    ("shapes", "layer"),
    [
        (CONV, lambda: torch.nn.Conv2d(32, 64, 3)),
        ({"weight": (300, 200), "bias": (300,)}, lambda: torch.nn.Linear(200, 300)),
    ],
    ids=["conv", "linear"],
)
def test_affine_layers_start_as_pytorch_starts_them(shapes, layer):
    torch.manual_seed(0)
    values = initial_values(5, "layer", ModuleKind.AFFINE, shapes)
    reference = layer()
    bound = 1 / math.sqrt(math.prod(shapes["weight"][1:]))
    for key in ("weight", "bias"):
        theirs = getattr(reference, key).detach().numpy()
        assert values[key].shape == theirs.shape
        assert np.abs(theirs).max() <= bound * (1 + 1e-6)
        assert 0.9 * bound < np.abs(values[key]).max() <= bound * (1 + 1e-6)
    assert values["weight"].mean() == pytest.approx(0, abs=0.02 * bound)
    assert values["weight"].std() == pytest.approx(reference.weight.std().item(), rel=0.02)


def test_norms_are_neutral_and_zeros_are_zero():
    shapes = {"weight": (8,), "bias": (8,)}
    norm = initial_values(0, "norm", ModuleKind.NORM, shapes)
    assert norm["weight"].tolist() == [1.0] * 8
    assert norm["bias"].tolist() == [0.0] * 8
    zero = initial_values(0, "zero", ModuleKind.ZERO, CONV)
    assert not zero["weight"].any()
    assert not zero["bias"].any()


@pytest.mark.parametrize("std", [1.0, 0.02])
def test_embeddings_are_normal(std):
    table = initial_values(0, "embedding", ModuleKind.EMBEDDING, {"weight": (500, 40)}, embedding_std=std)["weight"]
    assert table.std() == pytest.approx(std, rel=0.02)
    assert table.mean() == pytest.approx(0, abs=0.02 * std)
    assert 0.64 < (np.abs(table) < std).mean() < 0.72
