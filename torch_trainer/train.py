"""Training a ControlNet with PyTorch, from the configuration to the finished run folder, in execution order."""

import dataclasses
import logging
import os
import time
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.utils import logging as diffusers_logging
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils import logging as transformers_logging

from shared.checkpoints.choice import check_same_choice
from shared.checkpoints.policy import check_resumable
from shared.config import TrainConfig
from shared.data.batches import BatchLoader
from shared.data.joint_batches import JointBatches
from shared.data.views import Size
from shared.data.workers import threads_beside_accelerators
from shared.diffusion.drawing import Drawing
from shared.evaluation.held_out import HeldOutEvaluation
from shared.evaluation.validation import most_images_at_once
from shared.outgoing.messages import set_up_logging
from shared.profiling.device_peaks import peak_tflops
from shared.profiling.profiled_steps import profiled_steps
from shared.profiling.utilisation import Utilisation
from shared.run.aspect_buckets import check_same_buckets, digest_of_buckets, with_aspect_buckets
from shared.run.folder import held_run_folder, write_config
from shared.run.interruption import Interruption
from shared.run.lost_process import LostProcessError, told_when_a_process_is_lost
from shared.run.requests import SavingClock
from shared.run.result import BackendFacts, complete_run
from shared.run.setup import (
    PreparedRun,
    Steps,
    abandon_later_checkpoints,
    announce,
    check_resolution,
    nothing_left_to_do,
    open_held_out_evaluation,
    open_run,
    plan_steps,
    prepare,
    with_precomputed_text,
)
from shared.threads import in_background
from torch_trainer.base_models import BaseModels, load_base_models
from torch_trainer.checkpoints.safetensors_checkpoints import Checkpoints, checkpoint_record_of, result_to_save
from torch_trainer.compilation import keep_compiled_programs
from torch_trainer.distributed.accelerator import COMPUTE_DTYPES, device_name, make_accelerator, peak_device_memory_gib
from torch_trainer.distributed.placement import place
from torch_trainer.distributed.trainable_state import TrainableState
from torch_trainer.evaluation.evaluator import Evaluator
from torch_trainer.evaluation.image_sampler import ImageSampler
from torch_trainer.loop import Loop
from torch_trainer.profiling.memory import remember_allocations, write_memory
from torch_trainer.profiling.model_flops import ModelShapes, model_flops_per_image
from torch_trainer.profiling.profiler import Profiler
from torch_trainer.text_encoding import open_text_encoder, processes_of_host
from torch_trainer.training.step import Objective, TrainStep
from torch_trainer.training.weight_average import WeightAverage

logger = logging.getLogger("torch_trainer")

_PACKAGES = (
    "torch",
    "accelerate",
    "diffusers",
    "transformers",
    "xformers",
    "bitsandbytes",
    "deepspeed",
    "numpy",
    "datasets",
)


def train(config: TrainConfig) -> int:
    """Run the training that the configuration describes; returns the exit code of the process.

    Raises:
        UserError: a mistake in the configuration, the model or the data, told so that it can be mended.
    """
    started = time.perf_counter()
    accelerator = make_accelerator(config)
    remember_allocations(config, accelerator.device)
    with ExitStack() as ending:
        ending.push(partial(_leave, accelerator))
        set_up_logging("torch_trainer", logging.INFO if accelerator.is_main_process else logging.ERROR)
        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        config = _resolved(config, accelerator)
        if accelerator.is_main_process:
            ending.enter_context(held_run_folder(config))
        with told_when_a_process_is_lost(Path(config.output_dir), is_one_of_several=accelerator.num_processes > 1):
            accelerator.wait_for_everyone()  # the folder's checkpoints have their names
            return _train(config, accelerator, started, ending)


def _train(config: TrainConfig, accelerator: Accelerator, started: float, ending: ExitStack) -> int:
    """`ending` closes at the end of the run, when its result is saved."""
    prepared = prepare(config, "torch", is_main_process=accelerator.is_main_process)
    check_same_choice(gather_object([prepared.resumed_step]))
    prepared = with_aspect_buckets(prepared, accelerator.num_processes, processes_of_host(accelerator))
    check_same_buckets(gather_object([digest_of_buckets(prepared.source)]))
    steps = plan_steps(prepared, accelerator.num_processes)
    if nothing_left_to_do(prepared, steps):
        return 0
    if prepared.resume_from is not None:
        check_resumable(prepared.resume_from, checkpoint_record_of(prepared.resume_from), steps.record)
    profiled = profiled_steps(config, steps.first, steps.last)
    keep_compiled_programs(config)
    models = load_base_models(config, COMPUTE_DTYPES[accelerator.mixed_precision])
    check_resolution(config, models.vae_scale_factor)
    open_encoder = partial(open_text_encoder, config, accelerator, is_xl=prepared.is_xl)
    prepared = with_precomputed_text(prepared, "torch", open_encoder, processes_of_host(accelerator))
    parameters = sum(param.numel() for param in models.controlnet.parameters())  # FSDP divides them
    run = _place_run(prepared, steps, accelerator, models)
    with Interruption() as interruption:  # before a word of the run is said
        _begin_run(run, parameters)
        loop = _build_loop(run, profiled, started, ending)
        with logging_redirect_tqdm(), ExitStack() as closing:
            for resource in (loop.log, run.loader, loop.profiler):
                closing.callback(resource.close)
            loop.validation.measure_untrained(loop.models, steps.first)
            if prepared.resume_from is not None:
                loop.checkpoints.restore(prepared.resume_from)
            loop.log.restart_clock()
            _profile_memory(run, "initial")
            step = loop.run(interruption)
            _profile_memory(run, "final")
    if step < steps.last:
        interruption.say_stopped()
        return interruption.exit_code
    _publish(run, loop, started)
    return 0


def _leave(accelerator: Accelerator, kind: type[BaseException] | None, *_: object) -> None:
    if kind is not LostProcessError:  # which would be waited for
        accelerator.end_training()


@dataclass(frozen=True)
class _Run:
    """A run whose models, optimizer and batches are on their devices."""

    prepared: PreparedRun
    steps: Steps
    accelerator: Accelerator
    models: BaseModels
    objective: Objective
    optimizer: Any
    state: TrainableState
    average: WeightAverage | None
    loader: BatchLoader
    held_out: HeldOutEvaluation | None
    flops_per_image: Future[dict[Size, float]]

    @property
    def config(self) -> TrainConfig:
        return self.prepared.config

    @property
    def devices(self) -> str:
        return f"{self.accelerator.num_processes} × {device_name(self.accelerator.device)}"


def _place_run(prepared: PreparedRun, steps: Steps, accelerator: Accelerator, models: BaseModels) -> _Run:
    config, latent_shape = prepared.config, models.latent_shape(prepared.config.resolution)
    on_cpu = accelerator.device.type == "cpu"
    loader = BatchLoader(
        prepared.source,
        config,
        prepared.prompt_inputs,
        steps.batch,
        latent_shape=latent_shape,
        num_train_timesteps=prepared.schedule.num_train_timesteps,
        process_index=accelerator.process_index,
        process_count=accelerator.num_processes,
        default_workers=0 if on_cpu else threads_beside_accelerators(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
    )
    shapes = {
        size: ModelShapes.of(models, loader.blank(size), only_mid_control=config.only_mid_control)
        for size in loader.sizes
    }
    flops_per_image = in_background(  # it takes seconds
        lambda: {size: model_flops_per_image(shapes_of_size) for size, shapes_of_size in shapes.items()}
    )
    optimizer, state, average = place(config, accelerator, models)
    objective = Objective.create(prepared.schedule, config.snr_gamma, accelerator.device)
    held_out = open_held_out_evaluation(prepared, accelerator.num_processes, latent_shape)
    return _Run(
        prepared=prepared,
        steps=steps,
        accelerator=accelerator,
        models=models,
        objective=objective,
        optimizer=optimizer,
        state=state,
        average=average,
        loader=loader,
        held_out=held_out,
        flops_per_image=flops_per_image,
    )


def _begin_run(run: _Run, parameters: int) -> None:
    """Say what is about to happen, and make the run's folder its own."""
    announce(
        "Training a ControlNet with PyTorch",
        run.prepared,
        run.steps,
        devices=f"{run.devices} ({run.accelerator.distributed_type.value})",
        parameters=parameters,
        precision=str(run.models.dtype).removeprefix("torch."),
    )
    if run.accelerator.is_main_process:
        abandon_later_checkpoints(run.prepared, run.steps)
        write_config(run.prepared.output_dir, run.config)


def _build_loop(run: _Run, profiled: range, started: float, ending: ExitStack) -> Loop:
    """Open the run's folder, and make what the loop uses."""
    config, accelerator = run.config, run.accelerator
    validation, log = open_run(
        run.prepared,
        run.steps,
        run.held_out,
        is_main=accelerator.is_main_process,
        started=started,
        speed_figures=_utilisation(run),
    )
    ending.callback(validation.tracker.close)
    checkpoints = Checkpoints(
        accelerator, run.models.controlnet, run.state, run.prepared.output_dir, config.checkpoints_total_limit
    )
    ending.callback(checkpoints.wait)
    evaluator = Evaluator(accelerator, run.models, run.objective, _sampler(run), run.average)
    return Loop(
        steps=run.steps,
        accelerator=accelerator,
        train_step=TrainStep(accelerator, run.models, run.objective, run.optimizer, config, run.average),
        batches=JointBatches(run.loader, run.steps.first, is_one_of_several=accelerator.num_processes > 1),
        checkpoints=checkpoints,
        clock=SavingClock(config.checkpointing_seconds if accelerator.is_main_process else None),
        validation=validation,
        models=evaluator.models_in_training(),
        log=log,
        profiler=Profiler(config, profiled, run.steps.last, is_main=accelerator.is_main_process),
    )


def _utilisation(run: _Run) -> Utilisation:
    dtype = str(run.models.dtype).removeprefix("torch.")
    peak = peak_tflops(device_name(run.accelerator.device), dtype)
    return Utilisation(run.flops_per_image, run.accelerator.num_processes, peak)


def _profile_memory(run: _Run, moment: str) -> None:
    if run.accelerator.is_main_process:
        write_memory(run.config, moment)


def _publish(run: _Run, loop: Loop, started: float) -> None:
    """The finished ControlNet and what belongs to it."""
    accelerator = run.accelerator
    with nullcontext() if run.average is None else run.average.in_place():
        params = run.state.params()
    counts = torch.tensor([run.loader.skipped, run.loader.mismatched], device=accelerator.device)
    skipped, mismatched = accelerator.reduce(counts, reduction="sum").tolist()
    if accelerator.is_main_process:
        facts = BackendFacts("torch", run.devices, _PACKAGES, skipped, mismatched, peak_device_memory_gib())
        weights = result_to_save(run.config, accelerator.unwrap_model(run.models.controlnet), params)
        complete_run(run.prepared, run.steps.last, loop.log, loop.validation, facts, started, weights)


def _resolved(config: TrainConfig, accelerator: Accelerator) -> TrainConfig:
    """The configuration as accelerate completes it, the same in all processes (each may have read another clock)."""
    config = dataclasses.replace(config, mixed_precision=accelerator.mixed_precision)
    return broadcast_object_list([config])[0] if accelerator.num_processes > 1 else config


def _sampler(run: _Run) -> ImageSampler | None:
    """None for a run that makes no images."""
    most_images = most_images_at_once(run.prepared.images, run.held_out)
    if most_images == 0:
        return None
    return ImageSampler(
        run.models,
        Drawing.of_training(run.config, run.prepared.schedule),
        run.prepared.prompt_inputs,
        run.accelerator.device,
        images_at_once=min(run.config.train_batch_size, -(-most_images // run.accelerator.num_processes)),
    )
