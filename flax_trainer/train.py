"""Training a ControlNet with JAX, from the configuration to the finished run folder, in execution order."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.contrib.logging import logging_redirect_tqdm

from flax_trainer.base_models import COMPUTE_DTYPES, BaseModels, load_base_models, load_schedule
from flax_trainer.checkpoints import Checkpoints
from flax_trainer.image_sampler import ImageSampler
from flax_trainer.loop import Loop
from flax_trainer.models import FlaxControlNetModel
from flax_trainer.models.pretrained import HostParams
from flax_trainer.pmap_engine import AXIS, fetch, replicate
from flax_trainer.state import TrainState
from flax_trainer.step import AdamWSettings, FrozenParams, Objective, make_train_step
from flax_trainer.validation import LossEvaluator, Validation
from shared import hub
from shared.checkpoint_policy import (
    check_resumable,
    checkpoint_record,
    checkpoint_step,
    checkpoint_to_resume,
    set_aside_later,
)
from shared.config import TrainConfig, notices, to_yaml
from shared.data.batches import BatchLoader, BatchSpec
from shared.data.sources import SubsetSource, open_sources
from shared.data.tokenization import Tokenize, load_tokenizer, tokenizer_function
from shared.diffusion.loss_weighting import min_snr_weights
from shared.evaluation.fidelity import check_fidelity
from shared.evaluation.held_out import HeldOutEvaluation
from shared.interruption import Interruption
from shared.learning_rate import LearningRateSchedule
from shared.model_card import data_description, write_model_card
from shared.run_folder import is_finished, make_run_folder, write_report
from shared.run_log import (
    BatchArithmetic,
    RunLog,
    banner,
    command_line,
    package_versions,
    total_steps,
)
from shared.tracking import Tracker, check_trackers, open_trackers, read_metrics
from shared.validation_images import ValidationImages

logger = logging.getLogger("flax_trainer")

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "datasets")


def train(config: TrainConfig) -> int:
    """Run the training that the configuration describes; returns the exit code of the process.

    Raises:
        ValueError: a mistake in the configuration, the model or the data, told so that it can be mended.
    """
    started = time.perf_counter()
    _set_up_logging()

    # --- everything that can be wrong before a device is touched -----------------------------------------------------
    for notice in notices(config, "flax"):
        logger.info(notice)
    output_dir = make_run_folder(config)
    resume_from = checkpoint_to_resume(output_dir, config.resume_from_checkpoint)
    check_trackers(config)
    check_fidelity(config)
    images = ValidationImages(config) if config.validation_image else None
    repository = hub.prepare_repository(config, output_dir)
    schedule = load_schedule(config)
    tokenize = _tokenize(config)
    source, held_out_source = open_sources(config)
    models, initial = load_base_models(config, schedule)
    _check_resolution(config, models)

    # --- devices, batches, steps -------------------------------------------------------------------------------------
    _check_processes()
    arithmetic = BatchArithmetic(config.train_batch_size, jax.device_count(), config.gradient_accumulation_steps)
    epoch_size = source.manifest["samples"] or config.max_train_samples
    last_step = total_steps(config.max_train_steps, config.num_train_epochs, epoch_size, arithmetic.global_batch_size)
    first_step = 0 if resume_from is None else checkpoint_step(resume_from)
    if first_step > last_step:
        raise ValueError(
            f"{resume_from} is at step {first_step}, but the run is to end at step {last_step}. Raise "
            "--max_train_steps (or --num_train_epochs), or resume from an earlier checkpoint."
        )
    if is_finished(output_dir, last_step, first_step):
        logger.info("%s holds the finished run of %d steps; there is nothing left to do", output_dir, last_step)
        return 0
    learning_rate = LearningRateSchedule.from_config(config, last_step, arithmetic.global_batch_size)
    loader = BatchLoader(
        source,
        config,
        tokenize,
        BatchSpec(arithmetic.global_batch_size, arithmetic.accumulation_steps, arithmetic.devices),
        latent_shape=models.latent_shape(config.resolution),
        num_train_timesteps=models.schedule.num_train_timesteps,
    )
    held_out = _held_out_evaluation(config, held_out_source, tokenize, models)
    objective = _objective(config, models)
    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if config.allow_tf32 else "highest")

    # --- state: fresh, or continued ----------------------------------------------------------------------------------
    record = checkpoint_record(config, source.manifest, arithmetic.global_batch_size)
    fresh = TrainState.create(initial.controlnet)
    host_state = fresh if resume_from is None else _resumed_state(resume_from, fresh, record)
    if resume_from is not None:
        for abandoned in set_aside_later(output_dir, first_step):
            logger.warning("%s is of the course that this run leaves at step %d", abandoned, first_step)
    frozen = replicate(initial.frozen)

    # --- the run -----------------------------------------------------------------------------------------------------
    (output_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    facts: dict[str, Any] = {
        "Devices": f"{jax.device_count()} × {jax.devices()[0].device_kind} ({jax.default_backend()})",
        "Examples": f"{'an unknown number' if epoch_size is None else epoch_size}, {data_description(config)}",
        "Batch": arithmetic,
        "Steps": f"{last_step}, of which {first_step} are done" if first_step else last_step,
        "ControlNet": f"{sum(value.size for value in initial.controlnet.values()) / 1e6:,.1f} M parameters",
        "Precision": f"{jnp.dtype(COMPUTE_DTYPES[config.mixed_precision])}; ControlNet and optimizer float32",
        "Run folder": output_dir,
    }
    logger.info("%s", banner("Training a ControlNet with JAX", facts))
    tracker = _open_tracker(config, output_dir, first_step)
    checkpoints = Checkpoints(output_dir, keep=config.checkpoints_total_limit)
    validation = Validation(
        images=images,
        held_out=held_out,
        sampler=_sampler(config, models, tokenize, images, held_out),
        losses=LossEvaluator(models.defs, objective),
        tracker=tracker,
    )
    train_step = jax.pmap(
        make_train_step(models.defs, objective, _adamw_settings(config), axis_name=AXIS),
        axis_name=AXIS,
        in_axes=(0, 0, 0, None),
        donate_argnums=(0,),
    )
    log = RunLog(tracker, first_step, last_step, arithmetic.global_batch_size, epoch_size, config.logging_steps)
    loop = Loop(config, train_step, frozen, loader, learning_rate, checkpoints, record, validation, log)
    with Interruption() as interruption, logging_redirect_tqdm(), ExitStack() as closing:
        for resource in (checkpoints, tracker, log, loader):
            closing.callback(resource.close)
        _measure_untrained(validation, initial.controlnet, frozen, first_step, output_dir)
        state = replicate(host_state)
        del initial, fresh, host_state
        log.restart_clock()
        state = loop.run(state, first_step, last_step, interruption)
        step = int(fetch(state.step))
    if step < last_step:
        assert interruption.requested is not None, (step, last_step)
        logger.info("Stopped by %s; continue with --resume_from_checkpoint latest", interruption.requested.name)
        return interruption.exit_code

    # --- the finished ControlNet and what belongs to it --------------------------------------------------------------
    _finish(config, models, fetch(state), log, loader.skipped, validation, started, repository)
    return 0


def _finish(
    config: TrainConfig,
    models: BaseModels,
    state: TrainState,
    log: RunLog,
    skipped: int,
    validation: Validation,
    started: float,
    repository: str | None,
) -> None:
    output_dir = Path(config.output_dir)
    FlaxControlNetModel.save_params(output_dir, models.controlnet_config, state.params, models.defs.controlnet.layouts)
    step = int(state.step)
    report: dict[str, Any] = {
        "steps": step,
        "images_seen": step * log.global_batch_size,
        "loss": log.last_loss,
        "images_per_second": log.images_per_second,
        "samples_skipped": skipped,
        **({} if validation.held_out is None else validation.held_out.report()),
        "seconds_total": round(time.perf_counter() - started, 1),
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "backend": "flax",
        "versions": package_versions(_PACKAGES),
        "command": command_line(),
    }
    write_report(output_dir, report)
    facts: dict[str, Any] = {
        "Optimizer steps": step,
        "Images seen": report["images_seen"],
        **{
            name: report[name]
            for name in ("circle_iou", "color_accuracy", "edge_f1", "validation_loss")
            if name in report
        },
        "Hardware": report["devices"],
        "Software": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    pictures = [] if validation.images is None else validation.images.pictures(step)
    if validation.held_out is not None and validation.held_out.write_contact_sheet(output_dir / "contact_sheet.png"):
        logger.info(
            "Condition, before, after and ground truth are side by side in %s", output_dir / "contact_sheet.png"
        )
    write_model_card(output_dir, config, name=repository or output_dir.resolve().name, facts=facts, pictures=pictures)
    logger.info("The ControlNet is in %s", output_dir)
    if repository is not None:
        logger.info("Uploaded: %s", hub.push(config, output_dir, repository))


def _set_up_logging() -> None:
    """Our own progress, and of the libraries only what is wrong."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True)
    for package in ("flax_trainer", "shared"):
        logging.getLogger(package).setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own


def _tokenize(config: TrainConfig) -> Tokenize:
    if config.tokenizer_name is not None:
        tokenizer = load_tokenizer(config.tokenizer_name, cache_dir=config.cache_dir)
    else:
        tokenizer = load_tokenizer(
            str(config.pretrained_model_name_or_path), "tokenizer", config.revision, config.cache_dir
        )
    return tokenizer_function(tokenizer)


def _check_processes() -> None:
    if jax.process_count() > 1:
        raise ValueError(
            f"JAX runs in {jax.process_count()} processes; training on several hosts is not supported yet. Use one "
            "host with all of its devices."
        )


def _check_resolution(config: TrainConfig, models: BaseModels) -> None:
    factor = models.vae_scale_factor
    if config.resolution % factor:
        below = config.resolution // factor * factor
        raise ValueError(
            f"--resolution is {config.resolution}, but the base model's VAE works on multiples of {factor} pixels. Use "
            f"{below + factor}{f' or {below}' if below else ''}."
        )


def _resumed_state(checkpoint: Path, fresh: TrainState, record: dict[str, Any]) -> TrainState:
    checkpoints = Checkpoints(checkpoint.parent, keep=None, read_only=True)
    step = checkpoint_step(checkpoint)
    check_resumable(checkpoint, checkpoints.record(step), record)
    state = checkpoints.restore(step, fresh)
    checkpoints.close()
    return state


def _held_out_evaluation(
    config: TrainConfig, held_out: SubsetSource | None, tokenize: Tokenize, models: BaseModels
) -> HeldOutEvaluation | None:
    if held_out is None:
        return None
    return HeldOutEvaluation(
        config,
        held_out,
        tokenize,
        batch_size=config.train_batch_size * jax.local_device_count(),
        latent_shape=models.latent_shape(config.resolution),
        num_train_timesteps=models.schedule.num_train_timesteps,
    )


def _sampler(
    config: TrainConfig,
    models: BaseModels,
    tokenize: Tokenize,
    images: ValidationImages | None,
    held_out: HeldOutEvaluation | None,
) -> ImageSampler | None:
    counts = [0 if images is None else len(images.prompts), 0 if held_out is None else held_out.images_needed]
    if max(counts) == 0:
        return None
    per_device = min(config.train_batch_size, -(-max(counts) // jax.local_device_count()))
    return ImageSampler(models, tokenize, config, images_per_device=per_device)


def _measure_untrained(
    validation: Validation, controlnet: HostParams, frozen: FrozenParams, first_step: int, output_dir: Path
) -> None:
    """What the run starts from: logged by a fresh run, and found again by a continued one for its report."""
    if validation.held_out is None:
        return
    figures = validation.measure(replicate(controlnet), frozen, 0)
    if first_step == 0:
        validation.tracker.log(figures, 0)
    else:
        validation.held_out.remember(read_metrics(output_dir))


def _open_tracker(config: TrainConfig, output_dir: Path, first_step: int) -> Tracker:
    tracker = open_trackers(config, output_dir)
    # What a killed run logged after its last checkpoint happens again; what an earlier run logged here is not ours.
    tracker.truncate_after(first_step if first_step > 0 else -1)
    return tracker


def _objective(config: TrainConfig, models: BaseModels) -> Objective:
    timesteps = models.schedule.num_train_timesteps
    return Objective(
        schedule=models.schedule,
        loss_weights=np.ones(timesteps, np.float32)
        if config.snr_gamma is None
        else min_snr_weights(models.schedule, config.snr_gamma),
        scaling_factor=models.vae_config.scaling_factor,
        compute_dtype=jnp.dtype(COMPUTE_DTYPES[config.mixed_precision]),
    )


def _adamw_settings(config: TrainConfig) -> AdamWSettings:
    return AdamWSettings(
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        epsilon=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
