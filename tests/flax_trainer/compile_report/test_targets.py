"""The slices that can be compiled for, by the names that Cloud TPU gives them."""

import re

import pytest

from flax_trainer.compile_report.targets import CHIPS, parse_target


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "links"),
    [
        ("v4-8", 4, 1, 2),
        ("v4-32", 16, 4, 4),
        ("v4-128", 64, 16, 6),
        ("v5litepod-4", 4, 1, 2),
        ("v5e-1", 1, 1, 0),
        ("v5e-64", 64, 16, 4),
        ("v5p-8", 4, 1, 2),
        ("v6e-8", 8, 2, 3),
    ],
)
def test_a_slice_has_the_chips_that_its_name_says(name: str, chips: int, hosts: int, links: int) -> None:
    target = parse_target(name)
    assert (target.chips, target.hosts, target.links) == (chips, hosts, links)
    devices = target.devices()
    assert len(devices) == chips
    assert len({device.process_index for device in devices}) == hosts
    assert {device.device_kind for device in devices} == {target.chip.device_kind}


def test_peaks_are_known_and_follow_from_the_clock() -> None:
    """128 × 128 multipliers (256 × 256 on v6e) in every matrix unit, two FLOPs each per cycle."""
    units = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}
    for name, chip in CHIPS.items():
        assert chip.peak_tflops == pytest.approx(2 * units[name] * chip.clock_ghz / 1e3, rel=0.01)


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
