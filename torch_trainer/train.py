"""Training a ControlNet with PyTorch, from the configuration to the finished run folder, in execution order."""

import dataclasses
import logging
import time
from contextlib import ExitStack, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.utils import logging as diffusers_logging
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils import logging as transformers_logging

from shared.checkpoints.policy import check_resumable
from shared.config import TrainConfig
from shared.data.batches import BatchLoader
from shared.diffusion.samplers import unipc_plan
from shared.evaluation.validation import Validation, most_images_at_once
from shared.run.folder import held_run_folder, write_config
from shared.run.interruption import Interruption
from shared.run.log import RunLog
from shared.run.result import BackendFacts, complete_run
from shared.run.setup import (
    Preparation,
    announce,
    check_resolution,
    nothing_left_to_do,
    open_held_out_evaluation,
    open_run_tracker,
    plan_steps,
    prepare,
    set_aside_other_course,
    set_up_logging,
)
from shared.tracking import Tracker
from torch_trainer.base_models import BaseModels, load_base_models
from torch_trainer.checkpoints.safetensors_checkpoints import Checkpoints, checkpoint_record_of, result_to_save
from torch_trainer.distributed.accelerator import COMPUTE_DTYPES, make_accelerator, peak_device_memory_gib
from torch_trainer.distributed.placement import place
from torch_trainer.evaluation.evaluator import Evaluator
from torch_trainer.evaluation.image_sampler import NUM_INFERENCE_STEPS, ImageSampler
from torch_trainer.loop import Loop
from torch_trainer.training.step import Objective, TrainStep

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
    with ExitStack() as ending:
        ending.callback(accelerator.end_training)
        set_up_logging("torch_trainer", logging.INFO if accelerator.is_main_process else logging.ERROR)
        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        config = _resolved(config, accelerator)
        if accelerator.is_main_process:
            ending.enter_context(held_run_folder(config))
        return _train(config, accelerator, started, ending)


def _train(config: TrainConfig, accelerator: Accelerator, started: float, ending: ExitStack) -> int:
    """`ending` closes at the end of the run, when its result is saved."""
    is_main = accelerator.is_main_process

    # --- everything that can be wrong before work starts -------------------------------------------------------------
    prepared = prepare(config, "torch", is_main_process=is_main)
    output_dir = prepared.output_dir
    steps = plan_steps(prepared, accelerator.num_processes)
    if nothing_left_to_do(prepared, steps):
        return 0
    if prepared.resume_from is not None:
        check_resumable(prepared.resume_from, checkpoint_record_of(prepared.resume_from), steps.record)
    models = load_base_models(config, COMPUTE_DTYPES[accelerator.mixed_precision])
    check_resolution(config, models.vae_scale_factor)
    latent_shape = models.latent_shape(config.resolution)

    # --- models, optimizer and batches on the device -----------------------------------------------------------------
    parameters = sum(param.numel() for param in models.controlnet.parameters())
    optimizer, state, average = place(config, accelerator, models)
    objective = Objective.create(prepared.schedule, config.snr_gamma, accelerator.device)
    loader = BatchLoader(
        prepared.source,
        config,
        prepared.tokenize,
        steps.batch,
        latent_shape=latent_shape,
        num_train_timesteps=prepared.schedule.num_train_timesteps,
        process_index=accelerator.process_index,
        process_count=accelerator.num_processes,
    )
    held_out = open_held_out_evaluation(prepared, config.train_batch_size * accelerator.num_processes, latent_shape)
    sampler = _sampler(prepared, accelerator, models, most_images_at_once(prepared.images, held_out))
    evaluator = Evaluator(accelerator, models, objective, sampler, average)

    # --- the run -----------------------------------------------------------------------------------------------------
    devices = f"{accelerator.num_processes} × {_device_name(accelerator.device)}"
    announce(
        "Training a ControlNet with PyTorch",
        prepared,
        steps,
        devices=f"{devices} ({accelerator.distributed_type.value})",
        parameters=parameters,
        precision=str(models.dtype).removeprefix("torch."),
    )
    if is_main:
        set_aside_other_course(prepared, steps)
        write_config(output_dir, config)
    tracker = open_run_tracker(prepared, steps.first) if is_main else Tracker([])
    ending.callback(tracker.close)
    checkpoints = Checkpoints(accelerator, models.controlnet, state, output_dir, config.checkpoints_total_limit)
    validation = Validation(prepared.images, held_out, tracker, output_dir, writes=is_main)
    log = RunLog(
        tracker,
        steps.first,
        steps.last,
        steps.batch.global_batch_size,
        steps.epoch_size,
        config.logging_steps,
        shows_progress=is_main,
        started=started,
    )
    train_step = TrainStep(accelerator, models, objective, optimizer, config, average)
    models_in_training = evaluator.models_in_training()
    loop = Loop(
        config,
        accelerator,
        train_step,
        loader,
        steps.learning_rate,
        checkpoints,
        steps.record,
        validation,
        models_in_training,
        log,
    )
    with Interruption() as interruption, logging_redirect_tqdm(), ExitStack() as closing:
        for resource in (log, loader):
            closing.callback(resource.close)
        validation.measure_untrained(models_in_training, steps.first)
        if prepared.resume_from is not None:
            checkpoints.restore(prepared.resume_from)
        log.restart_clock()
        step = loop.run(steps.first, steps.last, interruption)
    if step < steps.last:
        reason = "another process" if interruption.requested is None else interruption.requested.name
        logger.info("Stopped by %s; continue with --resume_from_checkpoint latest", reason)
        return interruption.exit_code

    # --- the finished ControlNet and what belongs to it --------------------------------------------------------------
    with nullcontext() if average is None else average.in_place():
        params = state.params()
    skipped = accelerator.reduce(torch.tensor(loader.skipped, device=accelerator.device), reduction="sum").item()
    if is_main:
        weights = result_to_save(config, accelerator.unwrap_model(models.controlnet), params)
        backend_facts = BackendFacts("torch", devices, _PACKAGES, int(skipped), peak_device_memory_gib())
        complete_run(prepared, step, log, validation, backend_facts, started, weights)
    return 0


def _resolved(config: TrainConfig, accelerator: Accelerator) -> TrainConfig:
    """The configuration as accelerate completes it, the same in all processes (each may have read another clock)."""
    config = dataclasses.replace(config, mixed_precision=accelerator.mixed_precision)
    return broadcast_object_list([config])[0] if accelerator.num_processes > 1 else config


def _sampler(prepared: Preparation, accelerator: Accelerator, models: BaseModels, most_images: int) -> ImageSampler:
    config = prepared.config
    return ImageSampler(
        models,
        unipc_plan(prepared.schedule, NUM_INFERENCE_STEPS),
        prepared.tokenize,
        accelerator.device,
        resolution=config.resolution,
        seed=config.seed,
        guidance_scale=config.guidance_scale,
        images_at_once=min(config.train_batch_size, max(1, -(-most_images // accelerator.num_processes))),
    )


def _device_name(device: torch.device) -> str:
    module = getattr(torch, device.type)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type
