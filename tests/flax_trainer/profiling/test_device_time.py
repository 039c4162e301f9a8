"""Where the devices' time goes in traces of JAX's profiler."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from flax_trainer.profiling.device_time import device_time, kind_of
from shared.profiling.device_time import OUTSIDE

PROGRAM = """HloModule jit_train_step, is_scheduled=true
ENTRY %main (p: f32[8]) -> f32[8] {
  %fusion.1 = bf16[8] fusion(%p), metadata={op_name="jit(train_step)/jvp(unet)/normalisation/mul"}
  %custom-call.2 = bf16[8] custom-call(%fusion.1), metadata={op_name="jit(train_step)/jvp(unet)/conv_general_dilated"}
  %while.3 = bf16[8] while(%p), metadata={op_name="jit(train_step)/vae/while"}
  %fusion.4 = bf16[8] fusion(%p), metadata={op_name="jit(train_step)/vae/attention/dot_general"}
  ROOT %fusion.5 = f32[8] fusion(%p), metadata={op_name="jit(train_step)/optimizer/mul"}
}
"""


def test_a_gpu_works_as_long_as_its_kernels(tmp_path: Path) -> None:
    """Whatever the program says nothing of goes by the kernel's name."""
    trace = _written(
        tmp_path,
        _plane("/host:CPU", {"python": [("fusion.1", 0, 500, "fusion.1")]}),
        _plane(
            "/device:GPU:0",
            {
                "Stream #13(Compute)": [
                    ("loop_multiply_fusion", 0, 10, "fusion.1"),
                    ("sm90_xmma_fprop_implicit_gemm_bf16_nhwc", 10, 40, "custom-call.2"),
                    ("loop_add_fusion", 50, 4, "fusion.5"),
                ],
                "Stream #14(MemcpyH2D)": [("MemcpyH2D", 20, 6, None)],
                "XLA Modules": [("jit_train_step", 0, 60, None)],
            },
        ),
    )
    time = device_time(trace, PROGRAM, steps=2)
    assert time.by_part == pytest.approx({"unet": 25e-9, OUTSIDE: 3e-9, "optimizer": 2e-9})
    assert time.by_kind == pytest.approx(
        {"convolutions": 20e-9, "normalisation": 5e-9, "copies": 3e-9, "optimizer": 2e-9}
    )
    assert time.total == pytest.approx(30e-9)


def test_a_tpus_loop_does_not_count_what_runs_in_it_twice(tmp_path: Path) -> None:
    rows = {
        "XLA Modules": [("jit_train_step(7)", 0, 100, None)],
        "XLA Ops": [
            ("%while.3 = bf16[8] while(%p)", 0, 90, None),
            ("%fusion.4 = bf16[8] fusion(%p)", 10, 30, None),
            ("%fusion.4 = bf16[8] fusion(%p)", 50, 30, None),
            ("%fusion.5 = f32[8] fusion(%p)", 90, 10, None),
        ],
    }
    time = device_time(_written(tmp_path, _plane("/device:TPU:0", rows)), PROGRAM, steps=1)
    assert time.by_part == pytest.approx({"vae": 90e-9, "optimizer": 10e-9})
    assert time.by_kind == pytest.approx({"attention": 60e-9, "elementwise": 30e-9, "optimizer": 10e-9})


def test_a_trace_of_this_machine(tmp_path: Path) -> None:
    def step(weights: jax.Array, x: jax.Array) -> jax.Array:
        with jax.named_scope("unet"):
            y = jnp.tanh(x @ weights)
        with jax.named_scope("optimizer"):
            return weights - 0.1 * y

    weights = x = jnp.ones((256, 256))
    compiled = jax.jit(step).lower(weights, x).compile()
    jax.block_until_ready(compiled(weights, x))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(compiled(weights, x))
    (trace,) = tmp_path.rglob("*.xplane.pb")
    time = device_time(trace, compiled.as_text() or "", steps=1)
    assert time.by_part.keys() >= {"unet"}
    assert time.by_kind["matrix products"] > 0
    assert time.total == pytest.approx(sum(time.by_part.values())) == pytest.approx(sum(time.by_kind.values()))


@pytest.mark.parametrize(
    ("op_name", "kind"),
    [
        ("jit(step)/transpose(jvp(unet))/down_blocks.0/attention/dot_general", "attention"),
        ("jit(step)/jvp(unet)/normalisation/reduce_sum", "normalisation"),
        ("jit(step)/jvp(unet)/dot_general", "matrix products"),
        ("jit(step)/vae/conv_general_dilated", "convolutions"),
        ("jit(step)/psum", "collectives"),
        ("jit(step)/jvp(unet)/transpose", "copies"),
        ("jit(step)/jvp(unet)/add", "elementwise"),
    ],
)
def test_kinds_of_operations(op_name: str, kind: str) -> None:
    assert kind_of(op_name) == kind


def _plane(name: str, rows: dict[str, list[tuple[str, int, int, str | None]]]) -> str:
    """An XPlane in protocol buffers' text format; an event is (name, start, duration, hlo_op), in nanoseconds."""
    names = sorted({event[0] for events in rows.values() for event in events})
    lines = []
    for number, (row, events) in enumerate(rows.items(), start=1):
        told = []
        for event, start, duration, hlo_op in events:
            stats = "" if hlo_op is None else f'stats {{ metadata_id: 1 str_value: "{hlo_op}" }}'
            stats += ' stats { metadata_id: 2 str_value: "jit_train_step" }'
            times = f"offset_ps: {start * 1000} duration_ps: {duration * 1000}"
            told.append(f"events {{ metadata_id: {names.index(event) + 1} {times} {stats} }}")
        lines.append(f'lines {{ id: {number} name: "{row}" {" ".join(told)} }}')
    of_events = [
        f'event_metadata {{ key: {number} value {{ id: {number} name: "{event}" }} }}'
        for number, event in enumerate(names, start=1)
    ]
    of_stats = [
        f'stat_metadata {{ key: {number} value {{ id: {number} name: "{stat}" }} }}'
        for number, stat in enumerate(("hlo_op", "hlo_module"), start=1)
    ]
    return f'planes {{ name: "{name}" {" ".join(lines + of_events + of_stats)} }}'


def _written(folder: Path, *planes: str) -> Path:
    file = folder / "host.xplane.pb"
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(" ".join(planes)))
    return file
