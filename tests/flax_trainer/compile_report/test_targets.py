"""The slices that can be compiled for, by the names that Cloud TPU gives them."""

import re
from collections.abc import Sequence

import pytest

from flax_trainer.compile_report.targets import CHIPS, parse_target


@pytest.mark.parametrize(
    ("name", "chips", "hosts"),
    [
        ("v4-8", 4, 1),
        ("v4-32", 16, 4),
        ("v4-128", 64, 16),
        ("v5litepod-4", 4, 1),
        ("v5e-1", 1, 1),
        ("v5e-64", 64, 16),
        ("v5p-8", 4, 1),
        ("v6e-8", 8, 2),
    ],
)
def test_a_slice_has_the_chips_that_its_name_says(name: str, chips: int, hosts: int) -> None:
    target = parse_target(name)
    assert (target.chips, target.hosts) == (chips, hosts)
    devices = target.devices()
    assert len(devices) == chips
    assert len({device.process_index for device in devices}) == hosts
    assert {device.device_kind for device in devices} == {target.chip.device_kind}
    in_order = sorted(devices, key=lambda device: (device.process_index, device.id))
    assert devices == in_order, "programs of both engines number them so"


@pytest.mark.parametrize(
    ("name", "group", "links"),
    [
        ("v4-8", range(4), 2),
        ("v4-8", (0, 2), 1),
        ("v4-32", range(16), 3),  # 2×2×4: only cubes of 4 chips are closed to rings
        ("v4-128", range(64), 6),
        ("v4-128", range(4), 2),  # a host's 2×2
        ("v4-128", range(0, 64, 4), 4),  # one chip of each host: 2×2×4 of every second chip along two sides
        ("v5e-1", range(1), 0),
        ("v5e-64", range(64), 2),
        ("v5e-128", range(128), 3),  # 8×16, closed along the 16
        ("v5e-256", range(256), 4),
        ("v6e-8", range(8), 2),
    ],
)
def test_links_of_a_group_of_chips(name: str, group: Sequence[int], links: float) -> None:
    """Which sides of a slice are closed: Austin et al. 2025, chapter 2; they double what a side carries."""
    assert parse_target(name).links(group) == links


def test_peaks_are_known_and_follow_from_the_clock() -> None:
    """128 × 128 multipliers (256 × 256 on v6e) in every matrix unit, two FLOPs each per cycle."""
    units = {"v4": 8, "v5e": 4, "v5p": 8, "v6e": 4}
    for name, chip in CHIPS.items():
        peak = 2 * units[name] * chip.multiplier**2 * chip.clock_ghz / 1e3
        assert chip.peak_tflops == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v3-8", "--target is 'v3-8'; expected v4, v5e, v5p, v6e and a size"),
        ("v4", "--target is 'v4'; expected"),
        ("v4-12", "--target is 'v4-12'; the sizes of v4 here are v4-8, v4-16, v4-32"),
        ("v5e-2", "the sizes of v5e here are v5e-1, v5e-4, v5e-8"),
    ],
)
def test_unknown_slices(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_target(name)
