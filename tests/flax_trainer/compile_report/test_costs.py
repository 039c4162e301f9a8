"""Counted costs against programs whose cost is known. Everything is compiled for a TPU v4 that is not there."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from flax_trainer.compile_report.costs import Costs, costs_of
from flax_trainer.compile_report.hlo import Instruction, parse_program
from flax_trainer.compile_report.kernels import kernel_flops
from flax_trainer.compile_report.targets import Target, parse_target
from flax_trainer.distributed.mesh import DATA, FSDP, MeshEngine
from flax_trainer.models.kernels.attention import flash_attention_tpu
from flax_trainer.profiling.model_flops import flops_of

V4 = parse_target("v4-8")
N = 2048


@cache
def chip() -> jax.Device:
    return V4.devices()[0]


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(chip()))


def count(function: Callable[..., Any], *arguments: Any, target: Target = V4) -> tuple[Costs, float]:
    """(costs, FLOPs)"""
    traced = jax.make_jaxpr(function)(*arguments)
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    kernels = kernel_flops(traced.jaxpr, target.chip.multiplier)
    return costs_of(parse_program(text), kernels, target), flops_of(traced.jaxpr)


def layer(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.tanh(x @ weight)


def layers(times: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda x, weight: jax.lax.scan(lambda x, _: (layer(x, weight), None), x, length=times)[0]


def seconds(costs: Costs) -> float:
    return costs.cycles / (V4.chip.clock_ghz * 1e9)


def test_a_product_takes_about_what_its_flops_take() -> None:
    costs, flops = count(lambda x, weight: x @ weight, bf16(4 * N, N), bf16(N, N))
    assert flops == 2 * 4 * N * N * N
    assert 0.7 < flops / seconds(costs) / (V4.chip.peak_tflops * 1e12) < 1
    assert set(costs.by_kind) == {"matrix products"}
    assert costs.unknown_loops == 0


def test_the_attention_kernel_that_xla_writes_by_itself_counts() -> None:
    """In place of plain attention; its call has neither a name nor an estimate."""

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("default"):  # XLA's kernel knows no other of bfloat16 numbers
            scores = jnp.einsum("bqd,bkd->bqk", query, key)
            return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), value)

    costs, flops = count(attention, *[bf16(2, 2 * N, 512)] * 3)
    assert flops == 2 * 2 * 2 * (2 * N) ** 2 * 512
    assert 0.5 < flops / seconds(costs) / (V4.chip.peak_tflops * 1e12) <= 1
    assert "attention" in costs.by_kind


def test_a_loop_counts_as_often_as_it_runs() -> None:
    once, flops = count(layers(1), bf16(N, N), bf16(N, N))
    ten, flops_of_ten = count(layers(10), bf16(N, N), bf16(N, N))
    forty, _ = count(layers(40), bf16(N, N), bf16(N, N))
    assert flops_of_ten == 10 * flops == 10 * 2 * N**3
    # Both loops have the same body; the first program has none.
    assert forty.cycles == pytest.approx(4 * ten.cycles, rel=0.02)
    assert ten.cycles > 8 * once.cycles
    # Of each round but one: two matrices in, one out, and a copy.
    assert 27 * 3 * 2 * N**2 < forty.bytes_not_counted - ten.bytes_not_counted < 33 * 6 * 2 * N**2


def test_a_loop_may_begin_later() -> None:
    def later(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(30, 40, lambda _, x: layer(x, weight), x)

    ten, _ = count(layers(10), bf16(N, N), bf16(N, N))
    costs, flops = count(later, bf16(N, N), bf16(N, N))
    assert flops == 10 * 2 * N**3
    assert costs.cycles == pytest.approx(ten.cycles, rel=0.05)


def test_loops_in_loops_multiply() -> None:
    def nested(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, x: layers(5)(x, weight), x)

    inner, _ = count(layers(5), bf16(N, N), bf16(N, N))
    outer, flops = count(nested, bf16(N, N), bf16(N, N))
    assert flops == 15 * 2 * N**3
    assert outer.cycles == pytest.approx(3 * inner.cycles, rel=0.1)


def test_a_loop_whose_end_depends_on_its_results_is_told() -> None:
    def until_small(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.abs(x).max() > 1, lambda x: layer(x, weight), x)

    costs, _ = count(until_small, bf16(N, N), bf16(N, N))
    assert costs.unknown_loops == 1


def test_the_most_expensive_branch_counts() -> None:
    def either(number: jax.Array, x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.cond(number > 0, layers(6), layers(3), x, weight)

    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=SingleDeviceSharding(chip()))
    costs, _ = count(either, number, bf16(N, N), bf16(N, N))
    more, _ = count(layers(6), bf16(N, N), bf16(N, N))
    assert costs.cycles == pytest.approx(more.cycles, rel=0.05)


@pytest.mark.parametrize(
    ("name", "dtype", "features", "busy"),
    [
        ("v4-8", jnp.bfloat16, 128, 1.0),
        ("v4-8", jnp.bfloat16, 40, 3.2),
        ("v4-8", jnp.float32, 128, 6.0),  # XLA's own float32 products take 5.7 times as long as its bfloat16 ones
        ("v6e-1", jnp.bfloat16, 64, 4.0),
    ],
)
def test_a_kernel_takes_what_the_multipliers_are_busy_with(name: str, dtype: Any, features: int, busy: float) -> None:
    """Attention is two products; its gradients take five more, one of them the first of the two once again."""
    batch, length, heads = 2, 2048, 4
    product, target = 2.0 * batch * heads * length**2 * features, parse_target(name)
    sharding = SingleDeviceSharding(target.devices()[0])
    shape = jax.ShapeDtypeStruct((batch, length, heads, features), dtype, sharding=sharding)

    def loss(*arrays: jax.Array) -> jax.Array:
        return flash_attention_tpu(*arrays).astype(jnp.float32).sum()

    for function, products in ((flash_attention_tpu, 2), (jax.grad(loss, argnums=(0, 1, 2)), 7)):
        costs, flops = count(function, shape, shape, shape, target=target)
        assert flops == pytest.approx(products * product, rel=1e-2)
        kernels = busy * products * product / (target.chip.peak_tflops * 1e12) * target.chip.clock_ghz * 1e9
        beside = costs.cycles - kernels  # moving heads, if at all; XLA's own estimates are whole numbers
        assert -1 < beside < 4 * kernels
        assert beside == pytest.approx(round(beside), abs=1e-3)


def test_parts_and_kinds_of_work_are_told_apart() -> None:
    def step(x: jax.Array, weight: jax.Array) -> jax.Array:
        with jax.named_scope("unet"):
            x = x @ weight
        with jax.named_scope("controlnet"), jax.named_scope("normalisation"):
            x32 = x.astype(jnp.float32)
            x = (x32 * jax.lax.rsqrt(jnp.square(x32).mean(axis=0, keepdims=True))).astype(x.dtype)
        with jax.named_scope("optimizer"):
            return jnp.transpose(x) + 1

    costs, _ = count(step, bf16(4 * N, N), bf16(N, N))
    assert {"unet", "controlnet"} <= set(costs.by_part)
    assert {"matrix products", "normalisation"} <= set(costs.by_kind)
    assert sum(costs.by_part.values()) == pytest.approx(costs.cycles)
    assert sum(costs.by_kind.values()) == pytest.approx(costs.cycles)
    assert list(costs.by_part.values()) == sorted(costs.by_part.values(), reverse=True)


@pytest.mark.parametrize(("name", "links"), [("v4-8", 2), ("v4-32", 3), ("v4-128", 6)])
def test_sums_over_chips_take_what_their_bytes_take_on_the_links(name: str, links: int) -> None:
    """A ring sends every byte twice, but for each chip's own share: Patarasuk & Yuan 2009."""
    target = parse_target(name)
    mesh = Mesh(target.devices(), ("chips",))
    rows = jax.ShapeDtypeStruct((target.chips, N, N), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("chips")))

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "chips")

    mapped = jax.shard_map(total, mesh=mesh, in_specs=PartitionSpec("chips"), out_specs=PartitionSpec())
    costs, _ = count(mapped, rows, target=target)
    sent = 2 * 4 * N**2 * (target.chips - 1) / target.chips
    expected = sent / (links * 45e9) * 1.05e9
    assert costs.collective_cycles == pytest.approx(expected, rel=1e-6)
    assert costs.cycles < expected, "without the messages"


@pytest.mark.parametrize(
    ("name", "fsdp_devices", "links_of_group", "links_of_data"),
    [("v4-8", 4, 2, 0), ("v4-8", 2, 1, 1), ("v6e-8", 8, 2, 0), ("v4-32", 4, 2, 1), ("v4-128", 4, 2, 4)],
)
def test_messages_within_and_between_groups_count_for_the_chips_that_send_them(
    name: str, fsdp_devices: int, links_of_group: int, links_of_data: int
) -> None:
    """A divided array is gathered, and its gradient scattered: one round each; sums over the groups take two."""
    target = parse_target(name)
    mesh = MeshEngine.over(target.devices(), fsdp_devices).mesh
    part = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(FSDP)))

    def gathered_and_scattered(x: jax.Array) -> jax.Array:
        whole = jnp.tanh(jax.lax.all_gather(x, FSDP, tiled=True))
        return jax.lax.psum_scatter(whole, FSDP, tiled=True)

    def summed(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, DATA)

    def cycles_of(function: Callable[[jax.Array], jax.Array]) -> float:
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=PartitionSpec(FSDP), out_specs=PartitionSpec(FSDP), check_vma=False
        )
        costs, _ = count(mapped, part, target=target)
        return costs.collective_cycles

    groups = target.chips // fsdp_devices
    link = target.chip.link_gb_per_s * 1e9 / (target.chip.clock_ghz * 1e9)  # bytes per cycle
    sent = 2 * 4 * N**2 * (fsdp_devices - 1) / fsdp_devices
    # XLA scatters slices that are filled up, and sends some of their rows once more.
    assert cycles_of(gathered_and_scattered) == pytest.approx(sent / (links_of_group * link), rel=0.1)
    if groups == 1:
        assert cycles_of(summed) == 0
    else:
        sent = 2 * (4 * N**2 / fsdp_devices) * (groups - 1) / groups
        assert cycles_of(summed) == pytest.approx(sent / (links_of_data * link), rel=1e-6)


@pytest.mark.parametrize(("work", "hidden"), [(0, 0.0), (5_000, 5_000.0), (10**6, None)])
def test_a_message_is_waited_for_as_long_as_nothing_goes_on_beside_it(work: int, hidden: float | None) -> None:
    """None: all of it. The second one goes out when the first has arrived; after it nothing is left to do."""
    text = f"""HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%fused (p: f32[1024,1024]) -> f32[1024,1024] {{
  ROOT %p = f32[1024,1024] parameter(0)
}}

ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {{
  %x = f32[1024,1024] parameter(0)
  %all-reduce-start = f32[1024,1024] all-reduce-start(%x), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  %work = f32[1024,1024] fusion(%x), kind=kLoop, calls=%fused, backend_config={{"estimated_cycles":"{work}"}}
  %all-reduce-done = f32[1024,1024] all-reduce-done(%all-reduce-start)
  ROOT %all-reduce = f32[1024,1024] all-reduce(%all-reduce-done), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
}}
"""
    costs = costs_of(parse_program(text), {}, V4)
    assert costs.cycles == pytest.approx(work)
    message = costs.collective_cycles / 2
    assert costs.waiting_cycles == pytest.approx(2 * message - (message if hidden is None else hidden))


def test_a_fusion_without_an_estimate_takes_what_its_memory_traffic_takes() -> None:
    """The compiler then says 2⁶³ - 1: seen of plain attention's scores of 64 images, at 512 px."""
    text = """HloModule jit_f, is_scheduled=true

%fused (p: f32[1024,1024]) -> f32[1024,1024] {
  ROOT %p = f32[1024,1024]{1,0:T(8,128)} parameter(0)
}

ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {
  %x = f32[1024,1024]{1,0:T(8,128)} parameter(0)
  ROOT %y = f32[1024,1024]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused,
    backend_config={"estimated_cycles":"9223372036854775807"}
}
"""
    costs = costs_of(parse_program(text), {}, V4)
    assert seconds(costs) == pytest.approx(2 * 4 * 1024**2 / 1228e9)


def test_instructions_are_read_whole() -> None:
    tile = "{1,0:T(8,128)(2,1)}"
    text = f"""HloModule jit_f, is_scheduled=true

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {{
  %p = (s32[]{{:T(128)}}, bf16[8,128]{{1,0:T(8,128)(2,1)S(3)}}) parameter(0)
}}

ENTRY %main.4 (w.1: bf16[8,128]) -> bf16[8,128] {{
  %w.1 = bf16[8,128]{tile} parameter(0)
  %call.1 = (f32[8,512,128]{{2,1,0:T(8,128)}}, bf16[8]{{0:T(256)}}) custom-call(%w.1, /*index=1*/%w.1), metadata={{
    "a": "(b"
  }}, metadata={{op_name="jit(f)/unet/attention/mul"}}, backend_config={{"estimated_cycles":"17"}}
  ROOT %done = bf16[8,128]{tile} fusion(%w.1), kind=kLoop, calls=%body
}}
"""
    program = parse_program(text)
    assert program.entry == "main.4"
    call, done = list(program.computations["main.4"].values())[1:]
    assert (call.name, call.opcode, call.cycles) == ("call.1", "custom-call", 17)
    assert call.shapes == (("f32", (8, 512, 128)), ("bf16", (8,)))
    assert call.result_bytes == 8 * 512 * 128 * 4 + 8 * 2
    assert call.operands == ("w.1", "w.1")
    assert call.op_name == "jit(f)/unet/attention/mul"
    assert (done.called, done.operands) == ({"calls": ("body",)}, ("w.1",))
    assert isinstance(program.operands("main.4", done)[0], Instruction)
