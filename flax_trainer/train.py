"""Training a ControlNet with JAX, from the configuration to the finished run folder, in execution order."""

import dataclasses
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.contrib.logging import logging_redirect_tqdm

from flax_trainer.base_models import BaseModels, FrozenParams, InitialParams, load_base_models
from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints
from flax_trainer.checkpoints.result import result_to_save
from flax_trainer.checkpoints.resume import restore
from flax_trainer.compilation import (
    CompiledAhead,
    matmul_precision,
    shape_dtype_structs,
    use_compilation_cache,
)
from flax_trainer.distributed.engine import (
    Engine,
    check_engine_fits,
    compile_train_step,
    make_engine,
    peak_device_memory_gib,
)
from flax_trainer.distributed.joining import check_joined, join_processes
from flax_trainer.distributed.processes import (
    agree_or_raise,
    are_several,
    barrier,
    broadcast_config,
    check_shared_folder,
    every_process,
    is_main_process,
    sum_over_processes,
    without_processes,
)
from flax_trainer.evaluation.evaluator import Evaluator
from flax_trainer.evaluation.image_sampler import ImageSampler
from flax_trainer.loop import Loop
from flax_trainer.profiling.model_flops import model_flops_per_image
from flax_trainer.profiling.profiler import Profiler
from flax_trainer.text_encoding import open_text_encoder
from flax_trainer.training.state import TrainState
from flax_trainer.training.step import Objective, make_evaluation_step
from shared.checkpoints.choice import check_same_choice
from shared.config import TrainConfig
from shared.data.batches import BatchLoader
from shared.data.joint_batches import JointBatches
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
from shared.run.lost_process import LostProcessError, end_after_lost_process, told_when_a_process_is_lost
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
    config = broadcast_config(dataclasses.replace(config, mixed_precision=config.mixed_precision or "no"))
    with ExitStack() as ending:
        with agree_or_raise():
            if is_main:
                ending.enter_context(held_run_folder(config))
        try:
            with told_when_a_process_is_lost(Path(config.output_dir), is_one_of_several=are_several()):
                exit_code = _train(config, started, ending)
        except LostProcessError as error:
            end_after_lost_process(error)  # before anything that `ending` would ask of the others
    barrier("the run is complete")
    return exit_code


def _train(config: TrainConfig, started: float, ending: ExitStack) -> int:
    """`ending` closes at the end of the run, when its result is saved."""
    with agree_or_raise():
        prepared = prepare(config, "flax", is_main_process=is_main_process())
    check_same_choice(every_process(prepared.resumed_step))
    with agree_or_raise():
        models, initial = load_base_models(config, prepared.schedule)
        prepared, steps = _plan_steps(prepared, models)
        if nothing_left_to_do(prepared, steps):
            return 0
        prepared = with_precomputed_text(prepared, "flax", partial(open_text_encoder, config, models))
        run = _plan_run(prepared, models, steps)
    check_same_buckets(every_process(digest_of_buckets(prepared.source)))
    check_shared_folder(prepared.output_dir)
    host_state, untrained = _initial_state(run, initial), initial.trained
    frozen = run.engine.place_frozen(initial.frozen)
    with Interruption() as interruption:  # before a word of the run is said
        _begin_run(run, initial)
        loop = _build_loop(run, initial, frozen, started, ending)
        del initial
        with logging_redirect_tqdm(), ExitStack() as closing:
            for resource in (loop.log, run.loader, loop.profiler, loop.train_step):
                closing.callback(resource.close)
            state = run.engine.place_state(host_state)
            _compile_ahead(run, loop, state)
            # A fresh state holds the untrained parameters already.
            untrained_params = state.params if prepared.resume_from is None else run.engine.place_state(untrained)
            models_in_training = loop.evaluator.models_in_training(untrained_params)
            loop.validation.measure_untrained(models_in_training, run.steps.first)
            del untrained, untrained_params, models_in_training, host_state
            if len(run.loader.sizes) > 1:
                loop.train_step.wait()  # else a step of another size would stop for the compiler later on
            loop.log.restart_clock()
            loop.profiler.profile_memory("initial")
            state = loop.run(state, interruption)
            loop.profiler.profile_memory("final")
            step = int(run.engine.fetch(state.step))
    if step < run.steps.last:
        interruption.say_stopped()
        return interruption.exit_code
    _publish(run, loop, state, started)
    return 0


@dataclass(frozen=True)
class _Run:
    """What is known of a run before anything of it is on a device."""

    prepared: PreparedRun
    models: BaseModels
    objective: Objective
    engine: Engine
    steps: Steps
    profiled_steps: range
    loader: BatchLoader
    held_out: HeldOutEvaluation | None

    @property
    def config(self) -> TrainConfig:
        return self.prepared.config

    @property
    def devices(self) -> str:
        return f"{jax.device_count()} × {jax.devices()[0].device_kind}"


def _plan_steps(prepared: PreparedRun, models: BaseModels) -> tuple[PreparedRun, Steps]:
    """From here on the devices compute as the flags say, and the samples are in their buckets.

    Raises:
        UserError: the flags do not fit the models, the devices or the data.
    """
    config = prepared.config
    check_resolution(config, models.configs.vae.scale_factor)
    check_joined()
    use_compilation_cache(config.ccache)
    jax.config.update("jax_default_matmul_precision", matmul_precision(config))
    prepared = with_aspect_buckets(prepared, jax.device_count())
    return prepared, plan_steps(prepared, jax.device_count())


def _plan_run(prepared: PreparedRun, models: BaseModels, steps: Steps) -> _Run:
    """The devices and the batches.

    Raises:
        UserError: these do not fit the flags, the models or the data.
    """
    config, latent_shape = prepared.config, models.latent_shape(prepared.config.resolution)
    engine = make_engine(config)
    check_engine_fits(config, engine)
    profiled = profiled_steps(config, steps.first, steps.last)
    loader = BatchLoader(
        prepared.source,
        config,
        prepared.prompt_inputs,
        steps.batch,
        latent_shape=latent_shape,
        num_train_timesteps=models.schedule.num_train_timesteps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        default_workers=0 if jax.default_backend() == "cpu" else threads_beside_accelerators(),
    )
    held_out = open_held_out_evaluation(prepared, jax.device_count(), latent_shape)
    return _Run(
        prepared=prepared,
        models=models,
        objective=Objective.create(config, models),
        engine=engine,
        steps=steps,
        profiled_steps=profiled,
        loader=loader,
        held_out=held_out,
    )


def _initial_state(run: _Run, initial: InitialParams) -> TrainState:
    """Fresh, or that of the checkpoint to resume; numpy."""
    scales_loss = run.objective.compute_dtype == jnp.float16
    fresh = TrainState.create(
        initial.trained,
        scales_loss=scales_loss,
        averages=run.config.use_ema,
        eight_bits=run.config.use_8bit_adam,
    )
    if run.prepared.resume_from is None:
        return fresh
    return restore(run.prepared.resume_from, fresh, run.steps.record, run.models.defs.trained_layouts)


def _begin_run(run: _Run, initial: InitialParams) -> None:
    """Make the run's folder its own, and say what is about to happen."""
    if is_main_process():
        abandon_later_checkpoints(run.prepared, run.steps)
        write_config(run.prepared.output_dir, without_processes(run.config))
    barrier("the folder is as this run needs it")
    announce(
        "Training a ControlNet with JAX",
        run.prepared,
        run.steps,
        devices=f"{run.devices} ({jax.default_backend()})",
        parameters=sum(value.size for value in initial.controlnet.values()),
        precision=str(jnp.dtype(run.objective.compute_dtype)),
    )


def _build_loop(run: _Run, initial: InitialParams, frozen: FrozenParams, started: float, ending: ExitStack) -> Loop:
    """Open the run's folder, and make what the loop uses. Only the shapes of `initial` count."""
    config, engine = run.config, run.engine
    checkpoints = Checkpoints(run.prepared.output_dir, keep=config.checkpoints_total_limit)
    ending.callback(checkpoints.close)
    validation, log = open_run(
        run.prepared,
        run.steps,
        run.held_out,
        is_main=is_main_process(),
        started=started,
        speed_figures=_utilisation(run, initial),
    )
    ending.callback(validation.tracker.close)
    train_step = CompiledAhead(compile_train_step(config, run.models, engine))
    losses = engine.compile_for_rows(make_evaluation_step(run.models.defs, run.objective, engine.gather_params))
    return Loop(
        steps=run.steps,
        engine=engine,
        train_step=train_step,
        frozen=frozen,
        batches=JointBatches(run.loader, run.steps.first, is_one_of_several=jax.process_count() > 1),
        checkpoints=checkpoints,
        clock=SavingClock(config.checkpointing_seconds if is_main_process() else None),
        validation=validation,
        evaluator=Evaluator(losses, _sampler(run), frozen),
        log=log,
        profiler=Profiler(config, run.profiled_steps, run.steps.last, train_step.text),
    )


def _compile_ahead(run: _Run, loop: Loop, state: TrainState) -> None:
    """Begin to compile the step for every size of pictures, so that measuring goes on meanwhile."""
    if run.steps.first < run.steps.last and run.engine.compiles_ahead:
        for size in run.loader.sizes:
            batch = run.engine.place_batch(run.loader.blank(size))
            loop.train_step.compile_for(state, loop.frozen, batch, np.float32(0), size=size)


def _utilisation(run: _Run, initial: InitialParams) -> Utilisation:
    """The model's FLOPs are counted in the background, which takes seconds for a full-size model.

    The shapes are those of the host: what is placed may have an axis for the devices.
    """
    trained, frozen = shape_dtype_structs((initial.trained, initial.frozen))
    batches = {size: shape_dtype_structs(run.loader.blank(size)) for size in run.loader.sizes}
    count = partial(model_flops_per_image, run.models.defs, run.objective, trained, frozen)
    flops_per_image = in_background(lambda: {size: count(batch) for size, batch in batches.items()})
    peak = peak_tflops(jax.devices()[0].device_kind, str(jnp.dtype(run.objective.compute_dtype)))
    return Utilisation(flops_per_image, jax.device_count(), peak)


def _sampler(run: _Run) -> ImageSampler | None:
    """For as many images at once as are ever asked for; None for a run that makes none."""
    most = most_images_at_once(run.prepared.images, run.held_out)
    if most == 0:
        return None
    per_device = min(run.config.train_batch_size, -(-most // jax.device_count()))
    drawing = Drawing.of_training(run.config, run.models.schedule)
    return ImageSampler(run.engine, run.models, run.prepared.prompt_inputs, drawing, images_per_device=per_device)


def _publish(run: _Run, loop: Loop, state: TrainState, started: float) -> None:
    """The finished ControlNet and what belongs to it."""
    result = run.engine.fetch(state.result)
    skipped, mismatched = sum_over_processes(run.loader.skipped), sum_over_processes(run.loader.mismatched)
    if is_main_process():
        facts = BackendFacts("flax", run.devices, _PACKAGES, skipped, mismatched, peak_device_memory_gib())
        weights = result_to_save(run.config, run.models, result)
        complete_run(run.prepared, run.steps.last, loop.log, loop.validation, facts, started, weights)
