"""The report as people read it."""

import re
from collections.abc import Iterable, Iterator, Mapping

from flax_trainer.base_models import ModelConfigs
from flax_trainer.compile_report.drawing import DrawingReport
from flax_trainer.compile_report.report import GIB, Report
from flax_trainer.compile_report.targets import CHIPS, Target
from shared.config import TrainConfig

# XLA says it in two ways.
_NEEDED = re.compile(r"(?:Used|temporaries) \(?([\d.]+)G\)? (?:of|exceeds available HBM) \(?([\d.]+)G")


def notes(config: TrainConfig, configs: ModelConfigs) -> Iterator[str]:
    """What should be known of the figures, before minutes are spent on them."""
    if isinstance(configs.unet.sample_size, int):
        made_for = configs.unet.sample_size * configs.vae.scale_factor
        if config.resolution != made_for:
            yield f"The model is made for --resolution {made_for}; this is its step at {config.resolution} px."
    if config.aspect_buckets is not None:
        yield "--aspect_buckets: this is the step of the square; the other shapes have at most as many pixels."


def report_text(report: Report) -> str:
    """Several lines, each figure with its unit."""
    memory, costs, chip = report.memory, report.costs, report.target.chip
    cycles, hidden = costs.cycles + costs.waiting_cycles, costs.collective_cycles - costs.waiting_cycles
    lines = [
        f"{report.target.name}: {report.target.chips} chips, {report.images_per_chip} images per chip and step, "
        f"{report.global_batch_size} in all (compiler estimate)",
        " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in report.flags.items()),
        "",
        f"HBM per chip     {memory.peak / GIB:8.2f} GiB of {chip.hbm_gib:g} GiB",
        f"  trained        {memory.trained / GIB:8.2f} GiB   float32",
        f"  optimizer      {memory.optimizer / GIB:8.2f} GiB",
        f"  frozen models  {memory.frozen / GIB:8.2f} GiB",
        f"  temporary      {memory.temporary / GIB:8.2f} GiB   activations, gradients",
        f"Step             {report.seconds * 1e3:8.1f} ms    {cycles / 1e6:.1f} M cycles at {chip.clock_ghz:g} GHz",
        f"Messages         {costs.collective_cycles / 1e6:8.1f} M cycles, {hidden / 1e6:.1f} of them beside other work",
        f"Speed            {report.images_per_second:8.1f} images/s on all chips",
        f"Model FLOPs      {report.model_flops_per_image * report.images_per_chip / 1e12:8.2f} T per chip and step, "
        f"MFU {report.mfu:.1%} of {chip.peak_tflops:g} bfloat16 TFLOP/s",
        f"All FLOPs        {report.flops / 1e12:8.2f} T per chip and step",
        f"Memory traffic   {report.bytes_accessed / 1e9:8.1f} GB per chip and step",
        f"Compiled in      {report.compile_seconds:8.0f} s",
        "",
        *_shares("Cycles by part", costs.by_part, cycles),
        "",
        *_shares("Cycles by kind of work", costs.by_kind, cycles),
    ]
    if costs.unknown_loops:
        lines += ["", f"{costs.unknown_loops} loops end when their results say so, and count as one run each."]
    return "\n".join(lines)


def drawing_text(report: DrawingReport) -> str:
    """As `report_text`, of pictures that are drawn."""
    costs, chip = report.costs, report.target.chip
    lines = [
        f"{report.target.name}: {report.target.chips} chips, {report.pictures} pictures at once on each, "
        f"{report.num_inference_steps} steps of UniPC (compiler estimate)",
        "",
        f"HBM per chip     {report.peak_bytes / GIB:8.2f} GiB of {chip.hbm_gib:g} GiB",
        f"  models         {report.models_bytes / GIB:8.2f} GiB",
        f"Pictures         {report.seconds:8.3f} s     {costs.cycles / 1e6:.1f} M cycles at {chip.clock_ghz:g} GHz",
        f"Speed            {report.pictures_per_second:8.2f} pictures/s on all chips",
        f"Model FLOPs      {report.flops / 1e12:8.2f} T per chip, "
        f"MFU {report.mfu:.1%} of {chip.peak_tflops:g} bfloat16 TFLOP/s",
        f"Compiled in      {report.compile_seconds:8.0f} s",
        "",
        *_shares("Cycles by part", costs.by_part, costs.cycles),
        "",
        *_shares("Cycles by kind of work", costs.by_kind, costs.cycles),
    ]
    return "\n".join(lines)


def drawing_does_not_fit_text(config: TrainConfig, target: Target, error: ValueError) -> str:
    """What is too much, and what makes it less."""
    savings = [f"fewer pictures at once than --train_batch_size {config.train_batch_size}"]
    savings = savings * (config.train_batch_size > 1) + ["--mixed_precision bf16"] * (config.mixed_precision != "bf16")
    return _too_much("What draws the pictures", [*savings, *_elsewhere(config, target)], target, error)


def does_not_fit_text(config: TrainConfig, target: Target, error: ValueError) -> str:
    """What is too much, and what makes it less."""
    return _too_much("The step", _savings(config, target), target, error)


def _too_much(what: str, savings: Iterable[str], target: Target, error: ValueError) -> str:
    match = _NEEDED.search(str(error))
    needed = (
        f"it needs {match[1]} GiB of {match[2]} GiB" if match else f"it needs more than {target.chip.hbm_gib:g} GiB"
    )
    return "\n".join(
        [
            f"{what} does not fit {target.name}: {needed} of HBM per chip (compiler estimate). Try:",
            *(f"  {line}" for line in savings),
        ]
    )


def _savings(config: TrainConfig, target: Target) -> Iterator[str]:
    """What would need less memory and is not done yet; a smaller resolution always can be."""
    if config.train_batch_size > 1:
        yield f"a smaller --train_batch_size than {config.train_batch_size}, with more --gradient_accumulation_steps"
    if not config.gradient_checkpointing:
        yield "--gradient_checkpointing"
    elif config.gradient_checkpointing_policy != "everything":
        yield "--gradient_checkpointing_policy everything"
    if config.enable_xformers_memory_efficient_attention is False:
        yield "no --no_enable_xformers_memory_efficient_attention: the chip's own attention holds no scores"
    if config.mixed_precision != "bf16":
        yield "--mixed_precision bf16"
    if config.use_ema:
        yield "no --use_ema, which keeps the ControlNet once more"
    if target.chips > 1 and (config.parallelism != "mesh" or config.fsdp_devices < target.chips):
        yield f"--parallelism mesh --fsdp_devices {target.chips}, which divides the ControlNet"
    yield from _elsewhere(config, target)


def _elsewhere(config: TrainConfig, target: Target) -> Iterator[str]:
    larger = [chip.name for chip in CHIPS.values() if chip.hbm_gib > target.chip.hbm_gib]
    if larger:
        yield f"chips with more memory: {', '.join(larger)}"
    yield f"a smaller --resolution than {config.resolution}"


def batch_size_line(policy: str, batch_size: int, report: Report | None, failure: str) -> str:
    """One line per try of the search; `failure` says why there is no report."""
    tried = f"{policy:<18}--train_batch_size {batch_size:<4}"
    if report is None:
        return f"{tried}  {failure}"
    return (
        f"{tried}  {report.memory.peak / GIB:6.2f} GiB  {report.images_per_second / report.target.chips:6.1f} "
        f"images/s per chip  MFU {report.mfu:.1%}  (compiler estimate)"
    )


def _shares(title: str, shares: Mapping[str, float], whole: float) -> list[str]:
    return [title, *(f"  {name:<24}{cycles / 1e6:9.2f} M {cycles / whole:6.1%}" for name, cycles in shares.items())]
