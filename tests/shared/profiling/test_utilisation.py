"""The share of a device's peak that a run uses, and the published peaks."""

from concurrent.futures import Future

import pytest

from shared.profiling.device_peaks import peak_tflops
from shared.profiling.utilisation import Utilisation

SQUARE, TALL = (512, 512), (384, 640)


def test_utilisation_is_the_share_of_the_peak() -> None:
    counted: Future[dict[tuple[int, int], float]] = Future()
    counted.set_result({SQUARE: 2e12, TALL: 1e12})
    figures = Utilisation(counted, devices=4, peak_tflops=275.0)(110.0, [SQUARE])
    # Each of four devices does 27.5 images a second, 55 TFLOP, a fifth of what it could.
    assert figures == {"model_tflops_per_second": pytest.approx(55.0), "mfu": pytest.approx(0.2)}
    assert Utilisation(counted, 4, None)(110.0, [SQUARE]).keys() == {"model_tflops_per_second"}
    # Of six steps' images, four take half as much.
    assert Utilisation(counted, 4, None)(110.0, [SQUARE, TALL, TALL] * 2) == {
        "model_tflops_per_second": pytest.approx(55 * 2 / 3)
    }


def test_a_count_that_fails_is_told_once_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    counted: Future[dict[tuple[int, int], float]] = Future()
    utilisation = Utilisation(counted, devices=1, peak_tflops=275.0)
    counted.set_exception(NotImplementedError("no such attention"))
    assert utilisation(110.0, [SQUARE]) == utilisation(120.0, [SQUARE]) == {}
    (record,) = caplog.records
    assert "cannot be counted (NotImplementedError: no such attention)" in record.message


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5e", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float16", 312),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H200", "bfloat16", 989),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("TPU v4", "float16", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peaks_are_known_by_the_names_that_both_backends_have_for_devices(
    kind: str, dtype: str, peak: float | None
) -> None:
    assert peak_tflops(kind, dtype) == peak
