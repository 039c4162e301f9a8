"""Which part of the model an operation belongs to, and the parts as a plane of their own in a CPU's trace."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from flax_trainer.profiling.trace_parts import PLANE, name_parts, part_of


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(train_step)/shard_map/vae/conv_general_dilated", "vae"),
        ("jit(train_step)/jit(text_encoder)/dot_general", "text_encoder"),
        ("jit(train_step)/jvp(controlnet)/dot_general", "controlnet"),
        ("jit(train_step)/transpose(jvp(controlnet))/dot_general", "controlnet backward"),
        ("jit(train_step)/transpose(jvp(unet))/jvp(unet)/checkpoint/rematted_computation/sin", "unet backward"),
        ("jit(train_step)/while/body/jvp(unet)/add", "unet"),
        ("jit(train_step)/optimizer/mul", "optimizer"),
        ("jit(train_step)/psum", None),
        ("params['unet.conv_in.weight']", None),
        ("", None),
    ],
)
def test_the_first_scope_that_names_a_part_counts(op_name: str, part: str | None) -> None:
    assert part_of(op_name) == part


def test_scopes_of_a_real_program_are_found_in_its_trace(tmp_path: Path) -> None:
    def step(weights: jax.Array, x: jax.Array) -> jax.Array:
        def loss(weights: jax.Array) -> jax.Array:
            with jax.named_scope("controlnet"):
                y = jnp.tanh(x @ weights)
            with jax.named_scope("unet"):
                return jnp.sum(jnp.sin(y @ y))

        gradient = jax.grad(loss)(weights)
        with jax.named_scope("optimizer"):
            return weights - 0.1 * gradient

    compiled = jax.jit(step).lower(jnp.ones((256, 256)), jnp.ones((256, 256))).compile()
    weights = x = jax.block_until_ready(jnp.ones((256, 256)))
    jax.block_until_ready(compiled(weights, x))
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(2):
            weights = jax.block_until_ready(compiled(weights, x))
    (trace,) = tmp_path.rglob("*.xplane.pb")
    before = ProfileData.from_file(str(trace))
    operations = [
        event
        for plane in before.planes
        for line in plane.lines
        for event in line.events
        if "hlo_op" in dict(event.stats)
    ]

    name_parts(trace, compiled.as_text())

    plane = ProfileData.from_file(str(trace)).find_plane_with_name(PLANE)
    assert plane is not None
    spans = [event for line in plane.lines for event in line.events]
    assert {span.name for span in spans} >= {"controlnet", "unet", "unet backward", "controlnet backward"}
    first, last = min(event.start_ns for event in operations), max(event.end_ns for event in operations)
    assert all(first <= span.start_ns <= span.end_ns <= last for span in spans)
    assert [plane.name for plane in before.planes] == [
        plane.name for plane in ProfileData.from_file(str(trace)).planes if plane.name != PLANE
    ]
