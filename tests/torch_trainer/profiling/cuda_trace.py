"""A step on a GPU as Kineto tells it, written by hand: two threads of the host, two streams of the device.

The ControlNet is compiled and its backward one operation; the UNet is not, and recomputes in its backward pass, on the
thread of which sequence numbers are counted that the forward pass has too. Times are microseconds.
"""

from itertools import count
from typing import Any

PROCESS, MAIN, AUTOGRAD = 4242, 4242, 4300
STREAM, COPIES = 7, 20
BEGIN = 1_000_000.0  # of the trace

Content = dict[str, Any]


class CudaTrace:
    """`events` grows by what the methods add."""

    def __init__(self) -> None:
        self.events: list[Content] = [
            _name(PROCESS, MAIN, "thread 4242 (python3)"),
            _name(PROCESS, AUTOGRAD, "thread 4300 (pt_autograd_0)"),
            # What Kineto writes beside and must not count: its own range, and annotations repeated on the device.
            _complete("PyTorch Profiler (0)", "Trace", "Spans", "PyTorch Profiler", -5, 400),
            _complete("controlnet", "gpu_user_annotation", 0, STREAM, 20, 60, **{"External id": 1}),
        ]
        self._external, self._correlation = count(1), count(900)

    def range(self, name: str, start: float, duration: float) -> None:
        self._host(name, "user_annotation", MAIN, start, duration)

    def operation(
        self, name: str, start: float, duration: float, *, thread: int = MAIN, sequence: int | None = None, fwd: int = 0
    ) -> int:
        """Returns its external id. `fwd` is the number that autograd has for the thread of the forward pass."""
        numbers = {} if sequence is None else {"Sequence number": sequence, "Fwd thread id": fwd}
        return self._host(name, "cpu_op", thread, start, duration, **numbers)

    def kernel(
        self,
        name: str,
        launched: float,
        start: float,
        duration: float,
        *,
        external: int,
        thread: int = MAIN,
        stream: int = STREAM,
        category: str = "kernel",
        call: tuple[str, str] = ("cuda_runtime", "cudaLaunchKernel"),
    ) -> None:
        """A kernel, and the call that starts it."""
        numbers = {"External id": external, "correlation": next(self._correlation)}
        self.events += [
            _complete(call[1], call[0], PROCESS, thread, launched, 2, cbid=211, **numbers),
            _complete(name, category, 0, stream, start, duration, device=0, context=1, stream=stream, **numbers),
            {"ph": "s", "id": numbers["correlation"], "pid": PROCESS, "tid": thread, "ts": BEGIN, "cat": "ac2g"},
        ]

    def _host(self, name: str, category: str, thread: int, start: float, duration: float, **numbers: int) -> int:
        external = next(self._external)
        self.events.append(
            _complete(name, category, PROCESS, thread, start, duration, **{"External id": external}, **numbers)
        )
        return external


def a_step() -> Content:
    """What `export_chrome_trace` would write of one."""
    trace = CudaTrace()
    trace.range("train 3", 0, 300)
    trace.range("host_to_device", 1, 8)
    copied = trace.operation("aten::copy_", 2, 6)
    trace.kernel(
        "Memcpy HtoD (Pinned -> Device)",
        *(3, 5, 4),
        external=copied,
        stream=COPIES,
        category="gpu_memcpy",
        call=("cuda_runtime", "cudaMemcpyAsync"),
    )
    _forward(trace)
    _backward(trace)
    _optimizer(trace)
    return {"schemaVersion": 1, "displayTimeUnit": "ms", "baseTimeNanoseconds": 0, "traceEvents": trace.events}


def _forward(trace: CudaTrace) -> None:
    trace.range("vae", 10, 10)
    convolution = trace.operation("aten::conv2d", 11, 8)
    trace.kernel("void cudnn::engines_precompiled::nchwToNhwcKernel<float>", 12, 14, 3, external=convolution)
    trace.kernel("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_kernel_cudnn", 15, 17, 11, external=convolution)
    trace.range("controlnet", 20, 20)
    compiled = trace.operation("CompiledFunction", 22, 16, sequence=10)
    driver = ("cuda_driver", "cuLaunchKernel")
    trace.kernel("triton_red_fused_native_group_norm_silu_0", 24, 30, 5, external=compiled, call=driver)
    trace.kernel("triton_poi_fused__to_copy_clone_1", 27, 35, 5, external=compiled, call=driver)
    trace.kernel("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", 32, 40, 10, external=compiled)
    trace.range("unet", 42, 30)
    attention = trace.operation("aten::_scaled_dot_product_flash_attention", 44, 10, sequence=11)
    trace.kernel("void pytorch_flash::flash_fwd_kernel<traits>(params)", 46, 50, 20, external=attention)
    # Several operations have the number of the next backward, and the last of them is differentiated.
    trace.operation("aten::empty", 55, 1, sequence=12)
    product = trace.operation("aten::addmm", 57, 8, sequence=12)
    trace.kernel("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", 59, 70, 20, external=product)
    loss = trace.operation("aten::mean", 75, 5, sequence=13)
    trace.kernel("void at::native::reduce_kernel<512, 1, at::native::MeanOps<float>>", 77, 90, 2, external=loss)


def _backward(trace: CudaTrace) -> None:
    def differentiating(name: str, start: float, duration: float, sequence: int) -> int:
        trace.operation(
            f"autograd::engine::evaluate_function: {name}", start, duration, thread=AUTOGRAD, sequence=sequence, fwd=1
        )
        return trace.operation(name, start + 1, duration - 2, thread=AUTOGRAD, sequence=sequence, fwd=1)

    differentiating("MeanBackward0", 90, 8, 13)
    differentiating("AddmmBackward0", 100, 40, 12)
    # The block is computed again when its first saved tensor is asked for. Numbers are counted by thread.
    again = trace.operation("aten::silu", 103, 5, thread=AUTOGRAD, sequence=10)
    trace.kernel(
        "void at::native::vectorized_elementwise_kernel<4, silu>", *(104, 110, 6), external=again, thread=AUTOGRAD
    )
    product = trace.operation("aten::mm", 120, 10, thread=AUTOGRAD)
    trace.kernel("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_nn", *(122, 125, 20), external=product, thread=AUTOGRAD)
    attention = differentiating("ScaledDotProductFlashAttentionBackward0", 142, 20, 11)
    trace.kernel("void pytorch_flash::flash_bwd_kernel<traits>", *(146, 150, 40), external=attention, thread=AUTOGRAD)
    compiled = differentiating("CompiledFunctionBackward", 165, 40, 10)
    trace.kernel(
        "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_kernel_cudnn",
        *(170, 195, 30),
        external=compiled,
        thread=AUTOGRAD,
    )
    trace.kernel(
        "triton_poi_fused_add_silu_backward_7",
        *(180, 225, 8),
        external=compiled,
        thread=AUTOGRAD,
        call=("cuda_driver", "cuLaunchKernel"),
    )
    accumulation = trace.operation(
        "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 206, 8, thread=AUTOGRAD
    )
    trace.kernel(
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(args)", *(208, 233, 9), external=accumulation, thread=AUTOGRAD
    )


def _optimizer(trace: CudaTrace) -> None:
    trace.range("optimizer", 250, 30)
    trace.range("Optimizer.step#AdamW.step", 252, 25)
    step = trace.operation("aten::_fused_adamw_", 255, 20)
    trace.kernel("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", 260, 265, 12, external=step)
    # Of a call that the trace does not hold, the operation is known all the same.
    numbers = {"External id": step, "correlation": 1}
    trace.events.append(_complete("Memset (Device)", "gpu_memset", 0, STREAM, 280, 1, device=0, **numbers))


def _complete(
    name: str, category: str, pid: int | str, tid: int | str, start: float, duration: float, **args: Any
) -> Content:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": pid,
        "tid": tid,
        "ts": BEGIN + start,
        "dur": duration,
        "args": args,
    }


def _name(pid: int, tid: int, name: str) -> Content:
    return {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "ts": BEGIN, "args": {"name": name}}
