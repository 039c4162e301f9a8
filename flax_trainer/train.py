"""Training a ControlNet with JAX, from the configuration to the finished run folder, in execution order."""

import dataclasses
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax_trainer.ahead_of_time import CompiledAhead, in_background, without_values
from flax_trainer.compilation_cache import use_compilation_cache
from flax_trainer.configured_step import configured_train_step, matmul_precision, objective_of
from tqdm.contrib.logging import logging_redirect_tqdm

from flax_trainer.base_models import BaseModels, load_base_models, save_unet
from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints, check_same_arrays
from flax_trainer.checkpoints.torch_checkpoint import is_torch_checkpoint, read_torch_checkpoint, read_torch_record
from flax_trainer.distributed.engine import Engine, make_engine
from flax_trainer.distributed.processes import (
    all_or_none,
    check_joined,
    check_shared_folder,
    is_main_process,
    join_processes,
    same_everywhere,
    sum_over_processes,
    wait_for_all,
    without_processes,
)
from flax_trainer.evaluation.evaluator import Evaluator, LossEvaluator
from flax_trainer.evaluation.image_sampler import ImageSampler
from flax_trainer.loop import Loop
from flax_trainer.models import FlaxControlNetModel
from flax_trainer.models.params import HostParams
from flax_trainer.profiling.device_peaks import peak_tflops
from flax_trainer.profiling.model_flops import model_flops_per_image
from flax_trainer.profiling.profiler import Profiler, profiled_steps
from flax_trainer.profiling.utilisation import Utilisation
from flax_trainer.training.state import TrainState
from shared.checkpoints.policy import check_resumable, checkpoint_step
from shared.config import TrainConfig
from shared.data.batches import BatchLoader
from shared.evaluation.held_out import HeldOutEvaluation
from shared.evaluation.validation import Validation, most_images_at_once
from shared.models.trained_parts import UNET_FOLDER, separated
from shared.run.folder import held_run_folder, write_config
from shared.run.interruption import Interruption
from shared.run.log import RunLog
from shared.run.result import BackendFacts, SaveWeights, complete_run
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

logger = logging.getLogger("flax_trainer")

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "datasets")


def train(config: TrainConfig) -> int:
    """Run the training that the configuration describes; returns the exit code of the process.

    Raises:
        UserError: a mistake in the configuration, the model or the data, told so that it can be mended.
    """
    started = time.perf_counter()
    join_processes(config)
    is_main = is_main_process()
    set_up_logging("flax_trainer", logging.INFO if is_main else logging.ERROR)
    config = same_everywhere(dataclasses.replace(config, mixed_precision=config.mixed_precision or "no"))
    with ExitStack() as ending:
        with all_or_none():
            if is_main:
                ending.enter_context(held_run_folder(config))
        exit_code = _train(config, is_main, started, ending)
    wait_for_all("the run is complete")
    return exit_code


def _train(config: TrainConfig, is_main: bool, started: float, ending: ExitStack) -> int:
    """`ending` closes at the end of the run, when its result is saved."""
    with all_or_none():
        # --- everything that can be wrong before a device is touched -------------------------------------------------
        prepared = prepare(config, "flax", is_main_process=is_main)
        output_dir = prepared.output_dir
        models, initial = load_base_models(config, prepared.schedule)
        check_resolution(config, models.configs.vae.scale_factor)

        # --- devices, batches, steps ---------------------------------------------------------------------------------
        check_joined()
        use_compilation_cache(config.ccache)
        engine = make_engine(config)
        steps = plan_steps(prepared, jax.device_count())
        if nothing_left_to_do(prepared, steps):
            return 0
        profiled = profiled_steps(config, steps.first, steps.last)
        loader = BatchLoader(
            prepared.source,
            config,
            prepared.tokenize,
            steps.batch,
            latent_shape=models.latent_shape(config.resolution),
            num_train_timesteps=models.schedule.num_train_timesteps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        held_out = open_held_out_evaluation(
            prepared, config.train_batch_size * jax.device_count(), models.latent_shape(config.resolution)
        )
    check_shared_folder(output_dir)
    objective = objective_of(config, models)
    jax.config.update("jax_default_matmul_precision", matmul_precision(config))

    # --- state: fresh, or continued ----------------------------------------------------------------------------------
    fresh = TrainState.create(
        initial.trained, scales_loss=objective.compute_dtype == jnp.float16, averages=config.use_ema
    )
    host_state = (
        fresh
        if prepared.resume_from is None
        else _resumed_state(prepared.resume_from, fresh, steps.record, models.defs.trained_layouts)
    )
    frozen = engine.place_frozen(initial.frozen)

    # --- the run -----------------------------------------------------------------------------------------------------
    if is_main:
        set_aside_other_course(prepared, steps)
        write_config(output_dir, without_processes(config))
    wait_for_all("the folder is as this run needs it")
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    announce(
        "Training a ControlNet with JAX",
        prepared,
        steps,
        devices=f"{devices} ({jax.default_backend()})",
        parameters=sum(value.size for value in initial.controlnet.values()),
        precision=str(jnp.dtype(objective.compute_dtype)),
    )
    checkpoints = Checkpoints(output_dir, keep=config.checkpoints_total_limit)
    ending.callback(checkpoints.close)
    tracker = open_run_tracker(prepared, steps.first) if is_main else Tracker([])
    ending.callback(tracker.close)
    validation = Validation(prepared.images, held_out, tracker, output_dir, writes=is_main)
    evaluator = Evaluator(
        LossEvaluator(engine, models.defs, objective), _sampler(engine, prepared, models, held_out), frozen
    )
    train_step = CompiledAhead(configured_train_step(config, models, engine))
    profiler = Profiler(config, profiled, steps.last, train_step.text)
    flops_per_image = in_background(
        model_flops_per_image,
        models.defs,
        objective,
        *without_values((initial.trained, initial.frozen, loader.blank())),
    )
    log = RunLog(
        tracker,
        steps.first,
        steps.last,
        steps.batch.global_batch_size,
        steps.epoch_size,
        config.logging_steps,
        shows_progress=is_main,
        started=started,
        speed_figures=Utilisation(
            flops_per_image,
            jax.device_count(),
            peak_tflops(jax.devices()[0].device_kind, objective.compute_dtype),
        ),
    )
    loop = Loop(
        config,
        engine,
        train_step,
        frozen,
        loader,
        steps.learning_rate,
        checkpoints,
        steps.record,
        validation,
        evaluator,
        log,
        profiler,
    )
    with Interruption() as interruption, logging_redirect_tqdm(), ExitStack() as closing:
        for resource in (log, loader, profiler, train_step):
            closing.callback(resource.close)
        validation.measure_untrained(evaluator.at(engine.place_state(initial.trained)), steps.first)
        state = engine.place_state(host_state)
        if steps.first < steps.last and engine.compiles_ahead:
            train_step.compile_for(state, frozen, engine.place_batch(loader.blank()), np.float32(0))
        del initial, fresh, host_state
        log.restart_clock()
        profiler.profile_memory("initial")
        state = loop.run(state, steps.first, steps.last, interruption)
        profiler.profile_memory("final")
        step = int(engine.fetch(state.step))
    if step < steps.last:
        reason = "another process" if interruption.requested is None else interruption.requested.name
        logger.info("Stopped by %s; continue with --resume_from_checkpoint latest", reason)
        return interruption.exit_code

    # --- the finished ControlNet and what belongs to it --------------------------------------------------------------
    result, skipped = engine.fetch(state.result), sum_over_processes(loader.skipped)
    if is_main:
        backend_facts = BackendFacts("flax", devices, _PACKAGES, skipped, _peak_device_memory_gib())
        complete_run(prepared, step, log, validation, backend_facts, started, _result_to_save(config, models, result))
    return 0


def _result_to_save(config: TrainConfig, models: BaseModels, result: HostParams) -> Mapping[str, SaveWeights]:
    """How to write the ControlNet and, where its decoder was trained, the UNet into a folder, in diffusers' layout."""
    controlnet, decoder = separated(result)

    def save_controlnet(folder: Path) -> None:
        FlaxControlNetModel.save_params(folder, models.configs.controlnet, controlnet, models.defs.controlnet.layouts)

    def save_decoder(folder: Path) -> None:
        save_unet(folder / UNET_FOLDER, config, decoder)

    decoders: dict[str, SaveWeights] = {"the UNet": save_decoder} if decoder else {}
    return {"the ControlNet": save_controlnet, **decoders}


def _resumed_state(
    checkpoint: Path, fresh: TrainState, record: dict[str, Any], layouts: Mapping[str, str]
) -> TrainState:
    """The state of a checkpoint of either backend."""
    if is_torch_checkpoint(checkpoint):
        check_resumable(checkpoint, read_torch_record(checkpoint), record)
        state, _ = read_torch_checkpoint(checkpoint, layouts, fresh)
        state = state.with_loss_scaler_of(fresh)
        check_same_arrays(checkpoint, state, fresh)
        return state
    checkpoints = Checkpoints(checkpoint.parent, keep=None, read_only=True)
    step = checkpoint_step(checkpoint)
    check_resumable(checkpoint, checkpoints.record(step), record)
    state = checkpoints.restore(step, fresh)
    checkpoints.close()
    return state


def _sampler(
    engine: Engine, prepared: Preparation, models: BaseModels, held_out: HeldOutEvaluation | None
) -> ImageSampler | None:
    """For as many images at once as are ever asked for; None for a run that makes none."""
    most = most_images_at_once(prepared.images, held_out)
    if most == 0:
        return None
    per_device = min(prepared.config.train_batch_size, -(-most // jax.device_count()))
    return ImageSampler(engine, models, prepared.tokenize, prepared.config, images_per_device=per_device)


def _peak_device_memory_gib() -> float | None:
    """Of the fullest local device."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    counted = [peak for peak in peaks if peak is not None]
    return max(counted) / 2**30 if counted else None
