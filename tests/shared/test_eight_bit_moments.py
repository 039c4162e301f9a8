"""How Adam's moments are stored in eight bits, against bitsandbytes and against the definition of nearest."""

import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from bitsandbytes.optim import AdamW8bit

from flax_trainer.distributed.mesh import FSDP, spec_of
from flax_trainer.models import ControlNetConfig, FlaxControlNetModel, UNet2DConditionConfig
from flax_trainer.models.params import split
from flax_trainer.random_model import ARCHITECTURES
from shared.eight_bit_moments import (
    blocks_of,
    code_values,
    dequantised,
    from_bitsandbytes,
    quantised,
    to_bitsandbytes,
    zero_moment,
)

SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def moment(shape: tuple[int, ...], *, signed: bool, seed: int = 0) -> np.ndarray:
    """Of many magnitudes, as moments are."""
    rng = np.random.default_rng(seed)
    sizes = 10 ** rng.uniform(-9, 0, shape)
    return (sizes * rng.choice([-1, 1], shape) if signed else sizes).astype(np.float32)


@SIGNED
def test_codes_stand_for_bitsandbytes_values(signed: bool) -> None:
    np.testing.assert_allclose(code_values(signed=signed), create_dynamic_map(signed).numpy(), rtol=2e-7)


@SIGNED
@pytest.mark.parametrize("shape", [(64, 512), (512, 64), (3, 3, 96, 40), (1, 1, 320, 320)])
def test_every_number_gets_the_nearest_code(shape: tuple[int, ...], signed: bool) -> None:
    value = moment(shape, signed=signed)
    codes, scales = quantised(value, signed=signed)
    assert (codes.dtype, codes.shape, scales.dtype) == (np.uint8, shape, np.float32)
    axis, size = blocks_of(shape) or (0, 0)
    blocks = np.moveaxis(value, axis, -1).reshape(-1, size)
    np.testing.assert_array_equal(np.sort(scales.ravel()), np.sort(np.abs(blocks).max(axis=1)))
    stored = np.moveaxis(dequantised(codes, scales, signed=signed), axis, -1).reshape(-1, size)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    best = np.abs(blocks[:, :, None] / largest[:, :, None] - code_values(signed=signed)).min(axis=-1)
    np.testing.assert_allclose(np.abs(stored - blocks) / largest, best, atol=1e-6)


def test_a_block_of_zeros_stays_zero() -> None:
    for signed in (True, False):
        codes, scales = quantised(np.zeros((64, 80), np.float32), signed=signed)
        assert not dequantised(codes, scales, signed=signed).any()
        assert not scales.any()
        for made, expected in zip(zero_moment((64, 80), signed=signed), (codes, scales), strict=True):
            np.testing.assert_array_equal(made, expected)
            assert made.dtype == expected.dtype


@pytest.mark.parametrize("shape", [(4096,), (10_000,), (63, 65), (3, 3, 16, 28)])
def test_small_parameters_and_vectors_keep_float32(shape: tuple[int, ...]) -> None:
    assert blocks_of(shape) is None


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_no_block_is_divided_between_devices(architecture: str, devices: int) -> None:
    unet = UNet2DConditionConfig.from_dict(ARCHITECTURES[architecture].unet)
    params = split(FlaxControlNetModel.abstract(ControlNetConfig.from_unet_config(unet)))[1]
    stored = {name: blocks for name, value in params.items() if (blocks := blocks_of(value.shape)) is not None}
    assert sum(params[name].size for name in stored) > 0.99 * sum(value.size for value in params.values())
    for name, blocks in stored.items():
        shape = params[name].shape
        divided = [axis for axis, part in enumerate(spec_of(shape, devices)) if part == FSDP]
        assert len(shape) + blocks.axis not in divided, name
        assert 3 <= blocks.size <= 256, name


def test_bitsandbytes_state_is_read_as_it_is_meant() -> None:
    """Its own kernel says what its codes stand for."""
    weight = torch.nn.Parameter(torch.from_numpy(moment((70, 90), signed=True)))
    optimizer = AdamW8bit([weight])
    weight.grad = torch.from_numpy(moment((70, 90), signed=True, seed=1))
    optimizer.step()
    state = {kind: value.numpy() for kind, value in optimizer.state[weight].items() if isinstance(value, torch.Tensor)}
    for number in (1, 2):
        parts = [torch.from_numpy(state[f"{kind}{number}"]) for kind in ("state", "absmax", "qmap")]
        meant = torch.ops.bitsandbytes.dequantize_blockwise(*parts, 256, torch.float32)
        np.testing.assert_allclose(from_bitsandbytes(state, number, (70, 90)), meant.numpy(), rtol=1e-6)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("shape", [(70, 90), (5, 4)], ids=["eight bits", "small"])
def test_what_is_written_for_bitsandbytes_reads_back(shape: tuple[int, ...], number: int) -> None:
    value = moment(shape, signed=number == 1)
    state = to_bitsandbytes(value, number)
    read = from_bitsandbytes(state, number, shape)
    again = from_bitsandbytes(to_bitsandbytes(read, number), number, shape)
    assert np.abs(read - value).max() <= (0.0071 if value.size >= 4096 else 0)  # the lowest code stands for -0.99297
    assert np.linalg.norm(again - read) <= 0.02 * np.linalg.norm(read)


@pytest.mark.parametrize(
    "damage",
    [
        {"state1": np.zeros((70, 91), np.uint8)},
        {"state1": np.zeros((70, 90), np.int16)},
        {"absmax1": np.zeros(24, np.float32)},
        {"qmap1": np.zeros(255, np.float32)},
        {"qmap1": None},
        {"state1": None},
    ],
)
def test_another_state_is_refused(damage: dict[str, np.ndarray | None]) -> None:
    state = to_bitsandbytes(moment((70, 90), signed=True), 1) | damage
    with pytest.raises(ValueError, match=r"state1 is not there|qmap1 or absmax1 is not there"):
        from_bitsandbytes({kind: value for kind, value in state.items() if value is not None}, 1, (70, 90))
