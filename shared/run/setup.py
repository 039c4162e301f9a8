"""What both backends do before training, in the order in which users should hear of their mistakes."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from shared.checkpoints.choice import checkpoint_to_resume
from shared.checkpoints.policy import checkpoint_record, checkpoint_step, rename_later_checkpoints
from shared.config import Backend, TrainConfig, notices
from shared.config.learning_rate import LearningRateSchedule
from shared.data.batches import BatchSpec
from shared.data.buckets.source import BucketedSource
from shared.data.sources import Source, SubsetSource, open_sources
from shared.data.tokenization import PromptInputs, Tokenize, XLInputs, tokenizer_function
from shared.diffusion.samplers import validation_plan
from shared.diffusion.schedule import NoiseSchedule
from shared.evaluation.denoising import BINS
from shared.evaluation.fidelity import check_fidelity
from shared.evaluation.held_out import HeldOutEvaluation
from shared.evaluation.validation import Validation
from shared.evaluation.validation_images import ValidationImages
from shared.models.base_model import check_base_model, zeros_for_empty_prompt
from shared.models.configs import CLIPTextConfig, read_config
from shared.models.source import ModelSource, base_source, tokenizer_source, xl_tokenizer_sources
from shared.models.tokenizer_files import check_tokenizer_fits, read_tokenizer
from shared.models.trained_parts import sd_unlocked_warning
from shared.models.xl import is_xl, sizes_of_crop
from shared.precomputed_text.captions import countable
from shared.precomputed_text.precomputing import ALONE, Processes, TextEncoder, precompute_text
from shared.run import hub
from shared.run.folder import check_no_result, finished_steps, is_finished, make_run_folder
from shared.run.log import RunLog, SpeedFigures, banner, no_speed_figures
from shared.run.model_card import BaseKind, data_description, kind_of
from shared.run.requests import Requests
from shared.tracking import Tracker, check_trackers, open_trackers
from shared.untrusted.border import reason
from shared.user_errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """What a run needs and what needs no device: read and checked."""

    config: TrainConfig
    output_dir: Path
    resume_from: Path | None
    repository: str | None
    images: ValidationImages | None
    schedule: NoiseSchedule
    prompt_inputs: PromptInputs
    source: Source
    held_out_source: SubsetSource | None
    base_kind: BaseKind

    @property
    def resumed_step(self) -> int | None:
        return None if self.resume_from is None else checkpoint_step(self.resume_from)

    @property
    def is_xl(self) -> bool:
        """Whether the base model is a Stable Diffusion XL."""
        return self.prompt_inputs.xl is not None


def prepare(config: TrainConfig, backend: Backend, *, is_main_process: bool = True) -> PreparedRun:
    """Check and open everything that can be wrong before a device is touched.

    Only the main process prepares the repository to upload to.

    Raises:
        UserError: a mistake in the configuration, the base model's small files or the data.
    """
    for notice in notices(config, backend):
        logger.info(notice)
    if config.sd_unlocked:
        logger.warning(sd_unlocked_warning(config.learning_rate))
    output_dir = make_run_folder(config)
    resume_from = checkpoint_to_resume(output_dir, config.resume_from_checkpoint)
    if config.resume_from_checkpoint is None:
        check_no_result(output_dir)
    check_trackers(config)
    check_fidelity(config)
    images = ValidationImages(config) if config.validation_image else None
    repository = hub.prepare_repository(config, output_dir) if is_main_process else None
    # The schedule is a small file, so the first to read of a model that may not be there.
    schedule = NoiseSchedule.from_source(base_source(config, "scheduler"))
    if config.draws_pictures:
        validation_plan(schedule)  # which refuses what cannot be sampled
    unet = check_base_model(config, schedule.config)
    prompt_inputs = prompt_inputs_of(config, is_xl=is_xl(unet))
    if images is not None:
        images.show_used_text(prompt_inputs.tokenize)
    source, held_out_source = open_sources(config)
    if config.encodes_text_beforehand:
        countable([source])
    return PreparedRun(
        config=config,
        output_dir=output_dir,
        resume_from=resume_from,
        repository=repository,
        images=images,
        schedule=schedule,
        prompt_inputs=prompt_inputs,
        source=source,
        held_out_source=held_out_source,
        base_kind=kind_of(unet),
    )


def with_precomputed_text(
    prepared: PreparedRun,
    backend: Backend,
    open_encoder: Callable[[], TextEncoder],
    processes: Processes = ALONE,
) -> PreparedRun:
    """With `--precompute_text` the run whose captions are encoded, without it the run as it is.

    Args:
        open_encoder: called where something is to be encoded, and not kept.

    Raises:
        UserError: as `precompute_text`.
    """
    config, prompt_inputs = prepared.config, prepared.prompt_inputs
    if not config.encodes_text_beforehand:
        return prepared
    sources = [source for source in (prepared.source, prepared.held_out_source) if source is not None]
    encoded = precompute_text(config, backend, countable(sources), prompt_inputs, open_encoder, processes)
    return replace(prepared, prompt_inputs=replace(prompt_inputs, encoded=encoded))


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run. `record` is what its checkpoints say about it; `epoch_size` None if unknown."""

    batch: BatchSpec
    epoch_size: int | None
    first: int
    last: int
    learning_rate: LearningRateSchedule
    record: dict[str, Any]
    checkpointing_steps: int
    validation_steps: int

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint is due after a step, which counts from 1, whatever is asked for."""
        return step % self.checkpointing_steps == 0

    def due(self, step: int, asked: Requests) -> "Due":
        """What has to be done after a step, which counts from 1."""
        last, is_kept = step == self.last, self.is_saved(step) or asked.stop
        is_timed = asked.save and not (is_kept or last)
        return Due(
            save=is_kept or is_timed,
            is_timed=is_timed,
            validate=self.has_validation(step) and (last or not asked.stop),
            stop=last or asked.stop,
        )

    def has_validation(self, step: int) -> bool:
        """Whether one follows a step of a run that is not interrupted."""
        return step == self.last or step % self.validation_steps == 0


class Due(NamedTuple):
    """What follows a step: a checkpoint, which is or is not one of --checkpointing_seconds; a validation; the end."""

    save: bool
    is_timed: bool
    validate: bool
    stop: bool


def total_steps(
    max_train_steps: int | None, num_train_epochs: int, num_samples: int | None, global_batch_size: int
) -> int:
    """The optimizer steps of a run; batches run on across epochs, so only the very last one reaches past the end.

    Raises:
        UserError: neither the steps nor the size of the data are known.
    """
    if max_train_steps is not None:
        return max_train_steps
    if num_samples is None:
        raise UserError(
            "The number of samples in a stream is not known beforehand, so --num_train_epochs cannot say when to stop. "
            "Give --max_train_steps or --max_train_samples."
        )
    return math.ceil(num_train_epochs * num_samples / global_batch_size)


def batch_spec(config: TrainConfig, devices: int) -> BatchSpec:
    """The batches that a configuration asks for on so many devices of all hosts."""
    return BatchSpec(config.train_batch_size, devices, config.gradient_accumulation_steps)


def plan_steps(prepared: PreparedRun, devices: int) -> Steps:
    """What the data, the flags and the number of devices come to.

    Raises:
        UserError: the number of steps is unknown, or the checkpoint to resume lies beyond the last one.
    """
    config, resume_from = prepared.config, prepared.resume_from
    batch = batch_spec(config, devices)
    epoch_size = prepared.source.manifest["samples"] or config.max_train_samples
    last = total_steps(config.max_train_steps, config.num_train_epochs, epoch_size, batch.global_batch_size)
    first = prepared.resumed_step or 0
    if first > last:
        raise UserError(
            f"{resume_from} is at step {first}, but the run is to end at step {last}. Raise "
            "--max_train_steps (or --num_train_epochs), or resume from an earlier checkpoint."
        )
    return Steps(
        batch=batch,
        epoch_size=epoch_size,
        first=first,
        last=last,
        learning_rate=LearningRateSchedule.from_config(config, last, batch.global_batch_size),
        record=checkpoint_record(config, prepared.source.manifest, batch.global_batch_size, last),
        checkpointing_steps=config.checkpointing_steps,
        validation_steps=config.validation_steps,
    )


def nothing_left_to_do(prepared: PreparedRun, steps: Steps) -> bool:
    """Whether the run folder holds the finished run already; says so in the log.

    An upload that a kill or the Hub had ended is made up for.

    Raises:
        UserError: it holds the result of another run, and no checkpoint to go on from; or as `hub.upload_result`.
    """
    folder, begins_anew = prepared.output_dir, prepared.resume_from is None
    if is_finished(folder, steps.last, steps.last if begins_anew else steps.first):
        logger.info("%s holds the finished run of %d steps; there is nothing left to do", folder, steps.last)
        hub.upload_result(prepared.config, folder, prepared.repository)
        return True
    if begins_anew and finished_steps(folder) is not None:
        check_no_result(folder)
    return False


def abandon_later_checkpoints(prepared: PreparedRun, steps: Steps) -> None:
    """Rename checkpoints that lie after the one to resume, with a warning."""
    if prepared.resume_from is not None:
        for abandoned in rename_later_checkpoints(prepared.output_dir, steps.first):
            logger.warning("%s is of the course that this run leaves at step %d", abandoned, steps.first)


def announce(title: str, prepared: PreparedRun, steps: Steps, *, devices: str, parameters: int, precision: str) -> None:
    """Say in the log what is about to happen."""
    facts: dict[str, Any] = {
        "Devices": devices,
        "Examples": f"{steps.epoch_size or 'an unknown number'}, {data_description(prepared.config)}",
        **_buckets(prepared),
        **_several_conditions(prepared.config),
        "Batch": steps.batch,
        "Steps": f"{steps.last}, of which {steps.first} are done" if steps.first else steps.last,
        "ControlNet": f"{parameters / 1e6:,.1f} M parameters",
        "Precision": f"{precision}; ControlNet and optimizer float32",
        "Run folder": prepared.output_dir,
    }
    logger.info("%s", banner(title, facts))


def _buckets(prepared: PreparedRun) -> dict[str, str]:
    if not isinstance(prepared.source, BucketedSource):
        return {}
    counts = prepared.source.counts
    return {"Buckets": f"{len(counts)}: {', '.join(f'{size} ({count:,} examples)' for size, count in counts.items())}"}


def _several_conditions(config: TrainConfig) -> dict[str, str]:
    channels = config.channels_of_conditions
    if len(channels) == 1:
        return {}
    return {"Conditions": f"{' + '.join(map(str, channels))} = {sum(channels)} channels"}


def check_resolution(config: TrainConfig, vae_scale_factor: int) -> None:
    """Raises UserError where the base model's VAE cannot take images of this size."""
    if config.resolution % vae_scale_factor:
        below = config.resolution // vae_scale_factor * vae_scale_factor
        raise UserError(
            f"--resolution is {config.resolution}, but the base model's VAE works on multiples of {vae_scale_factor} "
            f"pixels. Use {below + vae_scale_factor}{f' or {below}' if below else ''}."
        )


def open_held_out_evaluation(
    prepared: PreparedRun, devices: int, latent_shape: tuple[int, int, int]
) -> HeldOutEvaluation | None:
    """The evaluation on the samples that `--num_evaluation_samples` holds out; None where it is 0.

    Every device takes as many rows at once as in training, or its share where there are fewer.
    """
    if prepared.held_out_source is None:
        return None
    share = -(-len(prepared.held_out_source) * BINS // devices)
    rows_per_device = min(prepared.config.train_batch_size, share)
    return HeldOutEvaluation(
        prepared.config,
        prepared.held_out_source,
        prepared.prompt_inputs,
        batch_size=rows_per_device * devices,
        latent_shape=latent_shape,
        num_train_timesteps=prepared.schedule.num_train_timesteps,
    )


def open_run(
    prepared: PreparedRun,
    steps: Steps,
    held_out: HeldOutEvaluation | None,
    *,
    is_main: bool,
    started: float,
    speed_figures: SpeedFigures = no_speed_figures,
) -> tuple[Validation, RunLog]:
    """The run's folder as this run needs it, and what writes to it. Whoever calls this closes both, and the tracker.

    Args:
        is_main: of several processes, one writes.
        started: the reading of `time.perf_counter` when the program began.
        speed_figures: what to log beside images per second.
    """
    tracker = open_run_tracker(prepared, steps.first) if is_main else Tracker([])
    validation = Validation(prepared.images, held_out, tracker, prepared.output_dir, writes=is_main)
    log = RunLog(
        tracker=tracker,
        first_step=steps.first,
        last_step=steps.last,
        global_batch_size=steps.batch.global_batch_size,
        epoch_size=steps.epoch_size,
        logging_steps=prepared.config.logging_steps,
        shows_progress=is_main,
        started=started,
        speed_figures=speed_figures,
    )
    return validation, log


def open_run_tracker(prepared: PreparedRun, first_step: int) -> Tracker:
    """The run's tracker, without what a killed run logged after its last checkpoint: those steps happen again.

    What an earlier run logged in the same folder is not a fresh run's, and goes too.

    Raises:
        UserError: a tracker cannot be opened, or what an earlier run logged is damaged or cannot be replaced.
    """
    tracker = open_trackers(prepared.config, prepared.output_dir)
    try:
        tracker.truncate_after(first_step if first_step > 0 else -1)
    except OSError as error:
        raise UserError(
            f"The figures that an earlier run left in {prepared.output_dir} cannot be replaced ({reason(error)}). If "
            "the disk is full, free some space; or choose another --output_dir."
        ) from error
    return tracker


def prompt_inputs_of(config: TrainConfig, *, is_xl: bool) -> PromptInputs:
    """What turns captions into what the base model's text encoders read.

    Raises:
        UserError: a tokenizer is missing or damaged, or does not fit its text encoder or the other one.
    """
    if not is_xl:
        name = config.tokenizer_name or str(config.pretrained_model_name_or_path)
        return PromptInputs(_tokenize_for(base_source(config, "text_encoder"), tokenizer_source(config), name))
    first, second = xl_tokenizer_sources(config)
    tokenize = _tokenize_for(base_source(config, "text_encoder"), first, first.name)
    tokenize_2 = _tokenize_for(base_source(config, "text_encoder_2"), second, second.name)
    lengths = [tokens([""]).shape[1] for tokens in (tokenize, tokenize_2)]
    if len(set(lengths)) > 1:
        raise UserError(
            f"The tokenizers {first.name} and {second.name} have model_max_length {lengths[0]} and "
            f"{lengths[1]}: expected the same, for Stable Diffusion XL reads both texts side by side. Correct their "
            "tokenizer_config.json."
        )
    sizes = sizes_of_crop(config.resolution, config.crops_coords_top_left_h, config.crops_coords_top_left_w)
    of_all = None if config.time_ids_from_data else sizes
    return PromptInputs(tokenize, XLInputs(tokenize_2, of_all, zeros_for_empty_prompt(config)))


def _tokenize_for(text_encoder: ModelSource, source: ModelSource, name: str) -> Tokenize:
    tokenizer = read_tokenizer(source)
    check_tokenizer_fits(tokenizer, name, read_config(text_encoder.file(), CLIPTextConfig))
    return tokenizer_function(tokenizer)
