"""Parts of the model and kinds of work in traces: one of a GPU, written by hand, and some of steps on this CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tests.torch_trainer.profiling.cuda_trace import COPIES, STREAM, a_step
from tests.torch_trainer.tiny_training import batch_of, training_of
from torch_trainer.profiling.kineto import Lane, Trace, read_trace
from torch_trainer.profiling.work import Span, spans_of, work_in

STEP = ["vae", "text_encoder", "controlnet", "unet", "unet backward", "controlnet backward", "optimizer"]


# --- a GPU -----------------------------------------------------------------------------------------------------------


def test_every_kernel_has_the_part_of_what_started_it_and_a_kind() -> None:
    assert [(piece.part, piece.kind, piece.busy) for piece in work_in(read_trace(a_step()))] == [
        (None, "copies", 4000),
        ("vae", "copies", 3000),
        ("vae", "convolutions", 11000),
        ("controlnet", "normalisation", 5000),
        ("controlnet", "copies", 5000),
        ("controlnet", "matrix products", 10000),
        ("unet", "attention", 20000),
        ("unet", "matrix products", 20000),
        (None, "elementwise", 2000),
        ("unet backward", "elementwise", 6000),  # computed again
        ("unet backward", "matrix products", 20000),
        ("unet backward", "attention", 40000),
        ("controlnet backward", "convolutions", 30000),
        ("controlnet backward", "elementwise", 8000),
        ("controlnet backward", "collectives", 9000),
        ("optimizer", "optimizer", 12000),
        ("optimizer", "optimizer", 1000),
    ]


def test_kernels_of_a_part_that_follow_each_other_are_one_span() -> None:
    trace = read_trace(a_step())
    assert {event.lane for event in trace.devices} == {Lane(0, STREAM), Lane(0, COPIES)}
    # Nanoseconds from the beginning of "train 3" on, which is before any kernel.
    assert spans_of(work_in(trace)) == [
        Span(Lane(0, STREAM), part, start * 1000, end * 1000)
        for part, start, end in (
            ("vae", 14, 28),
            ("controlnet", 30, 50),
            ("unet", 50, 90),
            ("unet backward", 110, 190),
            ("controlnet backward", 195, 242),
            ("optimizer", 265, 281),
        )
    ]


@pytest.mark.parametrize("name", ["somebody_elses_kernel", "volta_sgemm_64x64_nt"])
def test_what_a_kernels_name_does_not_say_its_operation_does(name: str) -> None:
    step = a_step()
    for event in step["traceEvents"]:
        if "xmma_fprop" in event.get("name", ""):
            event["name"] = name
    (kind,) = (piece.kind for piece in work_in(read_trace(step)) if piece.name == name)
    assert kind == "convolutions"


def test_a_call_on_a_thread_without_operations_is_found_by_its_operation() -> None:
    step = a_step()
    for event in step["traceEvents"]:
        if event.get("cat") == "cuda_driver":
            event["tid"] = 77
    assert [piece.part for piece in work_in(read_trace(step))] == [
        piece.part for piece in work_in(read_trace(a_step()))
    ]


# --- a CPU -----------------------------------------------------------------------------------------------------------


def trace_of(call: Callable[[], object], folder: Path) -> Trace:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    return read_trace(folder / "trace.json")


@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True}], ids=["plain", "gradient_checkpointing"])
def test_a_step_goes_through_its_parts(base_model: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    training, slices = training_of(base_model, gradient_accumulation_steps=2, **flags), 2
    batch = batch_of(4, slices=slices)
    training.step(batch, 1e-3)
    work = work_in(trace_of(lambda: training.step(batch, 1e-3), tmp_path))
    assert [span.part for span in spans_of(work)] == [*STEP[:-1] * slices, *["optimizer"] * 2]  # clipping, and AdamW
    # Every weight's gradient is in the backward pass of what is trained.
    assert {piece.part for piece in work if "AccumulateGrad" in piece.name} == {"controlnet backward"}
    kinds = {piece.kind for piece in work}
    assert kinds >= {"convolutions", "attention", "matrix products", "normalisation", "elementwise", "copies"}
    assert {piece.kind for piece in work if piece.part == "optimizer"} == {"optimizer"}
    begin, end = min(piece.start for piece in work), max(piece.end for piece in work)
    assert 0.9 * (end - begin) > sum(piece.busy for piece in work) > 0.5 * (end - begin)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
def test_compiled_models_are_told_apart_too(tmp_path: Path) -> None:
    """By torch.compile without its C++ compiler, which takes a minute."""
    controlnet, unet = (
        torch.compile(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()), backend="aot_eager")
        for _ in range(2)
    )

    def step() -> None:
        with record_function("controlnet"):
            residual = controlnet(torch.ones(4, 8))
        with record_function("unet"):
            out = unet(residual)
        out.square().mean().backward()

    step()
    work = work_in(trace_of(step, tmp_path))
    assert [span.part for span in spans_of(work)] == ["controlnet", "unet", "unet backward", "controlnet backward"]
    assert {piece.part for piece in work if piece.name == "CompiledFunctionBackward"} == {
        "unet backward",
        "controlnet backward",
    }
