"""`benchmarks.checkpoint_cost` at toy size."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.checkpoint_cost import (
    Cost,
    Saving,
    controlnet_without_weights,
    flax_saving,
    measure,
    part_of,
    told,
    torch_saving,
)
from shared.checkpoints.digests import Verdict, examine
from shared.checkpoints.policy import checkpoints_in


@pytest.mark.parametrize("saving", [flax_saving, torch_saving], ids=["flax", "torch"])
def test_what_is_measured_leaves_a_whole_checkpoint(saving: Callable[..., Saving], tmp_path: Path) -> None:
    controlnet = controlnet_without_weights("tiny")
    shapes = {name: tuple(param.shape) for name, param in controlnet.named_parameters()}
    cost = measure(*saving(controlnet, shapes, tmp_path))
    assert 0 < cost.held <= cost.whole
    (left,) = checkpoints_in(tmp_path)
    assert left.name == "checkpoint-2"
    assert examine(left) == Verdict(True, ())
    written = sum(path.stat().st_size for path in left.rglob("*") if path.is_file())
    assert written > 0.9 * 12 * sum(map(math.prod, shapes.values())), "random numbers do not compress"


@pytest.mark.parametrize("part", [0.1, 0.5, 1.0])
def test_a_part_is_of_all_sizes(part: float) -> None:
    shapes = {name: tuple(param.shape) for name, param in controlnet_without_weights("sd15").named_parameters()}
    count = sum(map(math.prod, shapes.values()))
    assert count == 361_279_120
    kept = part_of(shapes, part)
    assert sum(map(math.prod, kept.values())) == pytest.approx(part * count, rel=0.1)
    assert (kept == shapes) == (part == 1)


def test_a_share_is_of_the_seconds_between_two_checkpoints() -> None:
    line = told("flax", "sd15", 361_000_000, Cost(held=1.5, computing=0.5, whole=10), seconds=300)
    assert "4.33 GB; the training is held for 1.5 s (0.50% of 300 s; 0.5 s computing)" in line
    assert "whole after 10 s (0.433 GB/s)" in line
