"""How fast devices multiply at best: dense bfloat16 products summed in float32, per device as JAX counts devices."""

import re

# TFLOP/s by patterns of the names that JAX (`Device.device_kind`) and PyTorch (`torch.cuda.get_device_name`) have for
# devices, which are the same for GPUs: NVIDIA's own. The first that matches the whole of it counts.
_TPUS = (
    # Google's TPU documentation, "TPU v2" to "TPU v6e" (cloud.google.com/tpu/docs/v2 …), peak compute per chip, bf16.
    # On v2 and v3 each of a chip's two cores is a device, on later ones the chip.
    (r"TPU v2", 45 / 2),
    (r"TPU v3", 123 / 2),
    (r"TPU v4", 275),
    (r"TPU v5 lite|TPU v5e", 197),
    (r"TPU v5|TPU v5p", 459),
    (r"TPU v6 lite|TPU v6e", 918),
)
_NVIDIA_GPUS = (
    # NVIDIA's data sheets, "BFLOAT16 Tensor Core"; halved where they count sparsity.
    (r"NVIDIA A100.*", 312),  # A100 Tensor Core GPU data sheet, all forms
    (r"NVIDIA A10", 125),  # A10 Tensor Core GPU data sheet
    (r"NVIDIA L4", 121),  # L4 Tensor Core GPU data sheet
    (r"NVIDIA L40S", 362),  # L40S data sheet
    (r"NVIDIA H100 PCIe", 756),  # H100 Tensor Core GPU data sheet of 2023
    (r"NVIDIA H100 NVL", 835),  # H100 Tensor Core GPU data sheet
    (r"NVIDIA H100 80GB HBM3", 989),  # the same, SXM
    (r"NVIDIA H200", 989),  # H200 Tensor Core GPU data sheet, SXM
)


def peak_tflops(device_kind: str, dtype: str) -> float | None:
    """TFLOP/s of a device at products of this dtype, as "bfloat16"; None where that is not published.

    NVIDIA's GPUs are as fast in float16 as in bfloat16. In float32 the speed depends on how products are put together
    from shorter ones, so there is no peak to compare with.
    """
    if dtype == "bfloat16":
        peaks: tuple[tuple[str, float], ...] = (*_TPUS, *_NVIDIA_GPUS)
    elif dtype == "float16":
        peaks = _NVIDIA_GPUS
    else:
        return None
    return next((peak for pattern, peak in peaks if re.fullmatch(pattern, device_kind)), None)
