"""8-bit AdamW on the device: its codes are those of the tables, its steps those of bitsandbytes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes.backends.cpu import ops as bitsandbytes_on_cpus
from bitsandbytes.optim import AdamW8bit

from flax_trainer.training.eight_bit_moments import dequantise, quantise
from flax_trainer.training.optimizer import AdamWSettings, adamw_update
from flax_trainer.training.state import TrainState
from shared.eight_bit_moments import code_values, dequantised, from_bitsandbytes, quantised

SETTINGS = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, max_grad_norm=float("inf"))
SHAPE = (512, 768)  # [in, out]: a block is 256 numbers of a row of PyTorch's [out, in], as bitsandbytes'
STEPS = 10

step_of = jax.jit(lambda state, grads: adamw_update(state, grads, np.float32(1e-3), SETTINGS, np.array(False)))


def numbers_of_all_codes(*, signed: bool) -> np.ndarray:
    """[256, 512]: every value, every edge between two with its neighbours, and many magnitudes."""
    values = code_values(signed=signed)
    edges = (values[:-1] + values[1:]) / 2
    beside = [np.nextafter(edges, direction, dtype=np.float32) for direction in (-2, 2)]
    rng = np.random.default_rng(0)
    rest = 10 ** rng.uniform(-9, 0, 256 * 512 - 4 * 256) * (rng.choice([-1, 1], 256 * 512 - 4 * 256) if signed else 1)
    numbers = np.concatenate([values, edges, *beside, rest])
    return np.append(numbers, np.ones(256 * 512 - numbers.size)).astype(np.float32).reshape(256, 512)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_codes_are_those_of_the_tables(signed: bool) -> None:
    numbers = numbers_of_all_codes(signed=signed)
    numbers[0] = 1.0  # the scale of every block, which lie along the first axis
    expected, expected_scales = quantised(numbers, signed=signed)
    codes, scales = jax.jit(lambda moment: quantise(moment, signed=signed))(numbers)
    np.testing.assert_array_equal(scales, expected_scales)
    differ = np.asarray(codes) != expected
    assert np.abs(np.asarray(codes).astype(int) - expected).max() <= 1
    assert differ.mean() < 0.003  # numbers on an edge, where float32 may say either
    stored = dequantise(jnp.asarray(expected), jnp.asarray(expected_scales), signed=signed)
    np.testing.assert_allclose(stored, dequantised(expected, expected_scales, signed=signed), rtol=3e-7)


def gradients(decades: int) -> list[np.ndarray]:
    """[in, out]: of magnitudes that differ between numbers, and change from step to step."""
    rng = np.random.default_rng(1)
    sizes = 10 ** rng.uniform(-2 - decades, -2, SHAPE)
    return [(rng.normal(size=SHAPE) * sizes).astype(np.float32) for _ in range(STEPS)]


def steps_of_bitsandbytes(start: np.ndarray, decades: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The parameter after all steps, [in, out], and the state of its PyTorch form."""
    weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(start.T)))
    optimizer = AdamW8bit([weight], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for gradient in gradients(decades):
        weight.grad = torch.from_numpy(np.ascontiguousarray(gradient.T))
        optimizer.step()
    state = {kind: value.numpy() for kind, value in optimizer.state[weight].items() if isinstance(value, torch.Tensor)}
    return weight.detach().numpy().T, state


def our_steps(start: np.ndarray, decades: int, *, eight_bits: bool = True) -> TrainState:
    state = TrainState.create({"weight": start}, eight_bits=eight_bits)
    for gradient in gradients(decades):
        state = step_of(state, {"weight": gradient})
    return state


def nearest_codes(value: torch.Tensor, code: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, size: int) -> None:
    blocks = value.reshape(-1, size)
    scales.copy_(blocks.abs().amax(dim=1))
    shares = blocks / scales[:, None]
    out.copy_(torch.bucketize(shares, (code[1:] + code[:-1]) / 2).to(torch.uint8).reshape(out.shape))


def test_steps_are_bitsandbytes_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel for CPUs is coarse for shares below 1e-4: here both take the nearest codes."""
    monkeypatch.setattr(bitsandbytes_on_cpus, "_quant_blockwise_fp32_direct", nearest_codes)
    start = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    expected, moments = steps_of_bitsandbytes(start, decades=3)
    state = our_steps(start, decades=3)
    assert state.mu["weight"].dtype == state.nu["weight"].dtype == np.uint8
    change = np.asarray(state.params["weight"]) - start
    assert np.linalg.norm(change - (expected - start)) < 1e-3 * np.linalg.norm(expected - start)
    for number, (codes, scales, signed) in enumerate(
        ((state.mu, state.mu_scales, True), (state.nu, state.nu_scales, False)), start=1
    ):
        ours = dequantised(np.asarray(codes["weight"]), np.asarray(scales["weight"]), signed=signed)
        theirs = from_bitsandbytes(moments, number, SHAPE[::-1]).T
        assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)


def test_steps_are_nearly_those_of_adamw_and_of_bitsandbytes_as_it_is() -> None:
    start = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    theirs, _ = steps_of_bitsandbytes(start, decades=1)
    exact, ours = (
        np.asarray(our_steps(start, decades=1, eight_bits=eight_bits).params["weight"]) for eight_bits in (False, True)
    )
    for other in (exact, theirs):
        assert 0 < np.linalg.norm(ours - other) < 0.2 * np.linalg.norm(exact - start)


def test_a_run_that_is_not_finite_keeps_its_codes() -> None:
    """Rounding what was rounded may change it."""
    state = our_steps(np.ones(SHAPE, np.float32), decades=1)
    grads = {"weight": np.full(SHAPE, np.nan, np.float32)}
    after = jax.jit(lambda state: adamw_update(state, grads, np.float32(1e-3), SETTINGS, np.array(True)))(state)
    assert bool(after.non_finite)
    for kept, before in zip(jax.tree.leaves(after._replace(non_finite=0)), jax.tree.leaves(state), strict=False):
        np.testing.assert_array_equal(kept, before)


def test_small_parameters_and_vectors_keep_whole_moments() -> None:
    state = TrainState.create(
        {
            "large": np.ones((64, 64), np.float32),
            "small": np.ones((8, 8), np.float32),
            "bias": np.ones(5000, np.float32),
        },
        eight_bits=True,
    )
    after = step_of(state, jax.tree.map(np.ones_like, state.params))
    for moments, scales in ((after.mu, after.mu_scales), (after.nu, after.nu_scales)):
        assert {name: value.dtype.name for name, value in moments.items()} == {
            "large": "uint8",
            "small": "float32",
            "bias": "float32",
        }
        assert scales.keys() == {"large"}
    assert after.to_checkpoint().keys() == {"step", "params", "mu", "nu", "mu_scales", "nu_scales"}
