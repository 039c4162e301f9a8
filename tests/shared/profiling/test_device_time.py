"""The devices' time in the log and on disk."""

import json
import logging
from pathlib import Path

import pytest

from shared.profiling.device_time import FILE, OUTSIDE, DeviceTime, Piece

PIECES = [
    Piece("unet", "convolutions", 3e6),
    Piece("unet", "attention", 1e6),
    Piece(None, "copies", 4e6),
    Piece("unet backward", "convolutions", 8e6),
]


def test_shares_are_the_means_over_steps_most_first() -> None:
    time = DeviceTime.of(PIECES, steps=2)
    assert list(time.by_part) == ["unet backward", "unet", OUTSIDE]
    assert list(time.by_part.values()) == pytest.approx([4e-3, 2e-3, 2e-3])
    assert time.by_kind == pytest.approx({"convolutions": 5.5e-3, "copies": 2e-3, "attention": 5e-4})
    assert time.total == pytest.approx(8e-3)


def test_it_is_told_in_the_log_and_kept_for_programs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    time = DeviceTime.of(PIECES, steps=2)
    with caplog.at_level(logging.INFO, logger="shared"):
        time.tell(tmp_path)
    assert caplog.messages == [
        "8 ms of device time per step, by part: unet backward 50%, unet 25%, other 25%",
        "8 ms of device time per step, by kind of work: convolutions 69%, copies 25%, attention 6%",
    ]
    assert DeviceTime(**json.loads((tmp_path / FILE).read_text())) == time


def test_nothing_has_no_shares(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    DeviceTime.of([], steps=3).tell(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["total"] == 0
