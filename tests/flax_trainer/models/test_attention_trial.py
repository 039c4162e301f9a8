"""A GPU's attention is tried before a run relies on it."""

import logging
from typing import Any

import jax.numpy as jnp
import pytest

from flax_trainer.models.kernels import attention_trial
from flax_trainer.models.kernels.attention import plain_attention
from flax_trainer.models.kernels.attention_trial import kernel_that_runs
from shared.user_errors import UserError


def computes(monkeypatch: pytest.MonkeyPatch, attention: Any) -> list[tuple[int, int]]:
    """Let `attention` stand for cuDNN's; returns the numbers of keys and of features that it is tried with."""
    tried: list[tuple[int, int]] = []

    def in_its_place(query: Any, key: Any, value: Any, kernel: str) -> Any:
        tried.append((key.shape[1], key.shape[3]))
        return attention(query, key, value)

    monkeypatch.setattr(attention_trial, "dot_product_attention", in_its_place)
    return tried


@pytest.mark.parametrize(("kernel", "largest"), [("cudnn", 80), ("cudnn_sm90", 160)])
def test_what_runs_is_used(
    kernel: Any, largest: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = computes(monkeypatch, plain_attention)
    assert kernel_that_runs(kernel, jnp.bfloat16, asked_for=True) == kernel
    assert set(tried) >= {(128, 40), (77, 40), (77, largest)}
    assert max(features for _, features in tried) == largest
    assert not caplog.messages


def fails(*_: Any) -> Any:
    raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED: no engine\nand a long stack")


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (fails, "RuntimeError: CUDNN_STATUS_NOT_SUPPORTED: no engine"),
        (lambda query, key, value: plain_attention(query, key, value) * 1.5, "differ by"),
        (lambda query, key, value: plain_attention(query, key, value) * jnp.nan, "differ by nan"),
    ],
    ids=["fails", "wrong", "nan"],
)
def test_what_does_not_is_replaced_or_refused(
    attention: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    computes(monkeypatch, attention)
    with caplog.at_level(logging.WARNING):
        assert kernel_that_runs("cudnn", jnp.bfloat16, asked_for=False) == "blockwise"
    assert reason in caplog.text
    assert "long stack" not in caplog.text
    with pytest.raises(UserError, match="--enable_xformers_memory_efficient_attention") as refused:
        kernel_that_runs("cudnn", jnp.bfloat16, asked_for=True)
    assert reason in str(refused.value)


def test_cudnn_itself_does_not_run_on_this_machine() -> None:
    assert kernel_that_runs("cudnn", jnp.bfloat16, asked_for=False) == "blockwise"


@pytest.mark.parametrize("kernel", ["plain", "blockwise", "splash"])
def test_others_are_taken_as_they_are(kernel: Any) -> None:
    assert kernel_that_runs(kernel, jnp.bfloat16, asked_for=True) == kernel


def test_in_float32_there_is_nothing_to_try() -> None:
    assert kernel_that_runs("cudnn", jnp.float32, asked_for=True) == "cudnn"
