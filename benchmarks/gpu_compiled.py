"""What a training step asks of an NVIDIA GPU's memory, by XLA's compiler for GPUs.

    python3 -m benchmarks.gpu_compiled --target_config h100.txtpb [--images 16] [--cached] [--largest 20]
        [--architecture sdxl --resolution 1024] [--gradient_checkpointing]

No GPU is needed; `pip install 'jax[cuda13]'` brings the compiler. H100.TXTPB describes the GPU: XLA's
`GpuTargetConfigProto` as text. A program that is compiled on such a GPU with XLA_FLAGS=--xla_dump_to=FOLDER leaves one
there, as `….gpu_target_config.pbtxt`.

The step is that of `train_flax.py --mixed_precision bf16`, on one GPU. Counted are the operands and results of every
kernel, loops as often as they run, and the time that XLA's model of the GPU expects of it. The model knows nothing of
cuDNN, and what it says of fusions that Triton compiles (among the custom ones) is hours. No algorithms are chosen: that
needs a GPU. Nor does a program that compiles prove that cuDNN has a kernel for every shape in it.
"""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # without a GPU, its plugin cannot be asked for devices
os.environ["XLA_FLAGS"] = (
    "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false --xla_gpu_collect_cost_model_stats=true"
)

import jax
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from flax_trainer.base_models import ModelConfigs, define_models
from flax_trainer.compilation import matmul_precision
from flax_trainer.compile_report.hlo import Instruction, Program, parse_program
from flax_trainer.compile_report.report import GIB, step_shapes
from flax_trainer.compile_report.targets import parse_target
from flax_trainer.compile_report.topology_engines import engine_on
from flax_trainer.distributed.engine import compile_train_step
from flax_trainer.random_model import ARCHITECTURES
from shared.config import TrainConfig
from shared.diffusion.schedule import NoiseSchedule

ONE_CHIP = parse_target("v5e-1")  # its step has the shapes of any single device's
NO_KERNELS = ("parameter", "get-tuple-element", "bitcast", "tuple", "constant", "after-all", "partition-id")


class Kernel(NamedTuple):
    """Of a program; bytes and seconds of all times that it runs."""

    kind: str
    bytes: int
    seconds: float
    op_name: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target_config", type=Path, required=True)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sd15")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--cached", action="store_true", help="batches that bring latents and text embeddings")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--largest", type=int, default=0, help="so many of the kernels, by their bytes")
    arguments = parser.parse_args()
    compiled = compile_step(arguments)
    analysis = compiled.memory_analysis()
    assert analysis is not None, "the GPU compiler analyses memory"
    program = parse_program(compiled.as_text() or "")
    kernels = list(kernels_of(program, program.entry, 1))
    print(f"{'':<40}{'kernels':>8}{'GB':>9}{'ms':>14}   (compiler estimate)")
    print_sums("all", kernels)
    for kind in sorted({kernel.kind for kernel in kernels}):
        print_sums(kind, [kernel for kernel in kernels if kernel.kind == kind])
    arguments_gib, peak_gib = analysis.argument_size_in_bytes / GIB, analysis.peak_memory_in_bytes / GIB
    print(f"peak of memory {peak_gib:.2f} GiB, of which state, frozen models and batch {arguments_gib:.2f}")
    for kernel in sorted(kernels, key=lambda kernel: -kernel.bytes)[: arguments.largest]:
        print(f"{kernel.bytes / 1e6:9.1f} MB {kernel.seconds * 1e3:9.3f} ms  {kernel.kind}  {kernel.op_name}")


def print_sums(label: str, kernels: list[Kernel]) -> None:
    gigabytes, seconds = sum(kernel.bytes for kernel in kernels) / 1e9, sum(kernel.seconds for kernel in kernels)
    print(f"{label:<40}{len(kernels):>8}{gigabytes:>9.2f}{seconds * 1e3:>14.2f}")


def compile_step(arguments: argparse.Namespace) -> jax.stages.Compiled:
    config = TrainConfig(
        mixed_precision="bf16",
        train_batch_size=arguments.images,
        resolution=arguments.resolution,
        gradient_checkpointing=arguments.gradient_checkpointing,
        generated_circles=1,
        pretrained_model_name_or_path=arguments.architecture,
    )
    jax.config.update("jax_default_matmul_precision", matmul_precision(config))
    topology = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=arguments.target_config.read_text()
    )
    device: jax.Device = topology.devices[0]
    # JAX asks the GPU that is there, of which there is none.
    capability = float(device.compute_capability)
    cudnn.check_compute_capability = lambda least: capability >= float(least)
    parts = ARCHITECTURES[arguments.architecture]
    configs = ModelConfigs.of(parts.unet, parts.vae, parts.text_encoder, parts.text_encoder_2)
    models = define_models(config, configs, NoiseSchedule.from_config(parts.scheduler), device)
    engine = engine_on(config, [device])
    shapes = engine.shapes(*step_shapes(config, models, ONE_CHIP, from_cache=arguments.cached))
    return compile_train_step(config, models, engine).lower(*shapes, np.float32(0)).compile()


def kernels_of(program: Program, computation: str, times: int) -> Iterator[Kernel]:
    """What a computation runs on the GPU, and whatever it calls."""
    for instruction in program.computations[computation].values():
        if instruction.opcode == "while":
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.text)
            yield from kernels_of(program, instruction.called["body"][0], times * int(trips[1]) if trips else times)
        elif instruction.opcode == "call":
            yield from kernels_of(program, instruction.called["to_apply"][0], times)
        elif instruction.opcode not in NO_KERNELS and not instruction.opcode.endswith("-done"):
            operands = program.operands(computation, instruction)
            size = _result_bytes(instruction) + sum(operand.result_bytes for operand in operands)
            estimate = re.search(r'"exec_time_us":([\d.e+-]+)', instruction.text)
            seconds = float(estimate[1]) / 1e6 if estimate else 0.0
            yield Kernel(kind_of(program, instruction), times * size, times * seconds, instruction.op_name)


def kind_of(program: Program, instruction: Instruction) -> str:
    """Which library computes it, or what a fusion does that costs most beside its bytes."""
    library = re.search(r'custom_call_target="([^"]+)"', instruction.text)
    if library:
        return library[1]
    if instruction.opcode != "fusion":
        return instruction.opcode
    if "kind=kCustom" in instruction.text:
        return "fusion: custom"
    inside = {other.opcode for other in program.computations[instruction.called["calls"][0]].values()}
    if "reduce" in inside:
        return "fusion: sums"
    return "fusion: transposition" if "kind=kInput" in instruction.text else "fusion: elementwise"


def _result_bytes(instruction: Instruction) -> int:
    """Without a library's workspace, the last result: cuDNN's and cuBLAS's are not known before a GPU is."""
    is_library = "custom_call_target=" in instruction.text and len(instruction.shapes) > 1
    workspace = instruction.shapes[-1] if is_library and instruction.shapes[-1][0] in ("u8", "s8") else ("u8", (0,))
    return instruction.result_bytes - workspace[1][0]


if __name__ == "__main__":
    main()
