"""A profile that cannot be written is no reason to end a training."""

import logging

import pytest

from shared.profiling.only_watching import only_watching


def test_what_fails_is_told_and_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    with only_watching("A trace"):
        raise PermissionError(13, "Permission denied")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith("A trace cannot be written (PermissionError: ")
    assert record.message.endswith("The training goes on without.")


def test_an_interruption_is_none_of_that() -> None:
    with pytest.raises(KeyboardInterrupt), only_watching("A trace"):
        raise KeyboardInterrupt
