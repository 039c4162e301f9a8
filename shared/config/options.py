"""The configuration of a training run: one flat dataclass, one attribute per command-line flag.

The names, types and meanings are those of diffusers' train_controlnet_flax.py, train_controlnet.py and
train_controlnet_sdxl.py; where their defaults differ, the default here serves a first run on either backend.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal

from shared.config.flags import (
    BELOW_ONE,
    FROM_ZERO,
    Backend,
    Equivalent,
    Flag,
    Missing,
    Rule,
    at_least,
    at_most,
    flag,
    flags_of,
    within,
)

__all__ = [
    "CHANNELS_OF_A_PICTURE",
    "FLAGS",
    "MOST_CONDITIONS",
    "SECRETS",
    "Backend",
    "InterpolationMode",
    "MismatchedPairs",
    "ScheduleName",
    "TrainConfig",
    "as_in_training",
]

InterpolationMode = Literal["nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"]
MismatchedPairs = Literal["skip", "resize", "crop"]
ScheduleName = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]

_model = partial(flag, "model")
_data = partial(flag, "data")
_training = partial(flag, "training")
_optimizer = partial(flag, "optimizer")
_validation = partial(flag, "validation")
_checkpoints = partial(flag, "checkpoints")
_logging = partial(flag, "logging and hub")
_performance = partial(flag, "performance")
_profiling = partial(flag, "profiling")

# Beyond its `at_most`, a run could only end for want of memory or threads, or of numbers: steps are counted in 32 bits.
_MOST_STEPS = 2**31 - 1
# Stable Diffusion's autoencoders halve the side three times; the trainer checks the factor of the one it loads.
_DIVISIBLE_BY_VAE_FACTOR = Rule(lambda side: side % 8 == 0, "divisible by 8, which the VAE shrinks by")

_MOST_BUCKETS = 64  # more than the largest --resolution has shapes, each a compilation

CHANNELS_OF_A_PICTURE = Rule(lambda channels: channels in (1, 3), "1 or 3")

MOST_CONDITIONS = 16
"""Images of one sample; ControlNets of two or three are trained."""

_LARGEST_CROP = 2**16  # pixels; no picture that is opened has longer sides


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything a run is told. Attribute names are flag names; lists are tuples; a step is an optimizer step.

    The dataclass itself checks nothing: `shared.config.validate` does. What is declared of a flag beside its meaning,
    `shared.config.flags.Facts` explains.
    """

    pretrained_model_name_or_path: str | None = _model(
        None,
        "The base Stable Diffusion model: a folder in diffusers layout or a Hub repository.",
        names="weights",
        must_match=["resume", "compare"],
    )
    controlnet_model_name_or_path: str | None = _model(
        None,
        "The ControlNet to start from: a folder or a Hub repository. Without it the ControlNet starts as a copy of the "
        "base model's UNet encoder with zero output layers.",
        names="weights",
        must_match=["resume", "compare"],
    )
    pretrained_vae_model_name_or_path: str | None = _model(
        None,
        "A VAE to use in place of the base model's: a folder or a Hub repository.",
        names="weights",
        must_match=["resume", "compare"],
    )
    tokenizer_name: str | None = _model(
        None,
        "The tokenizer, a folder or a Hub repository, where it is not the base model's; for Stable Diffusion XL one "
        "with both tokenizers, in its subfolders tokenizer and tokenizer_2.",
        names="tokenizer",
        must_match=["resume", "compare"],
    )
    revision: str | None = _model(
        None, "The branch, tag or commit of the base model's repository.", must_match=["resume", "compare"]
    )
    variant: str | None = _model(
        None, "The variant of the base model's weight files, for example fp16.", must_match=["resume", "compare"]
    )
    controlnet_revision: str | None = _model(
        None,
        "The branch, tag or commit of the repository that --controlnet_model_name_or_path names.",
        must_match=["resume", "compare"],
    )
    from_pt: bool = _model(
        False,
        "Read the base model's PyTorch weights; both backends always do.",
        flax=Equivalent("PyTorch safetensors are what is read with or without it"),
    )
    controlnet_from_pt: bool = _model(
        False,
        "Read the starting ControlNet's PyTorch weights; both backends always do.",
        flax=Equivalent("PyTorch safetensors are what is read with or without it"),
    )
    cache_dir: str | None = _model(
        None, "The folder that keeps downloaded models and datasets. Without it, the Hub library's own folder is used."
    )

    dataset_name: str | None = _data(
        None,
        "The training data, as a Hub dataset or a folder that the datasets library can load by itself.",
        names="data",
        must_match=["compare"],
    )
    dataset_config_name: str | None = _data(
        None, "The configuration of --dataset_name, where it has several.", must_match=["compare"]
    )
    train_data_dir: str | None = _data(
        None,
        "The training data, as a local folder: an image folder, a folder with ControlNet's prompt.json, or, with "
        "--load_from_disk, a saved dataset.",
        names="data",
        must_match=["compare"],
    )
    load_from_disk: bool = _data(
        False, "Read --train_data_dir as a dataset written by save_to_disk.", must_match=["compare"]
    )
    allowed_data_dirs: tuple[str, ...] | None = _data(
        None,
        "Folders outside of the training data's own in which its rows may name files. Without it, rows that lead out "
        "of the data's folder are skipped: whoever wrote the data should not choose among your other files.",
    )
    train_shards: tuple[str, ...] | None = _data(
        None,
        "The training data, as WebDataset tars: paths or URLs, with {000..127} ranges and * patterns.",
        names="data",
        must_match=["compare"],
    )
    shards_image_key: str | None = _data(
        None,
        "The extension of the target image in the tars. Without it, the usual names are tried.",
        only_with="train_shards",
        must_match=["compare"],
    )
    shards_conditioning_key: tuple[str, ...] | None = _data(
        None,
        "The extension of the condition image in the tars, or of each of several, as --conditioning_image_column has "
        "it. Without it, the usual names of one are tried.",
        only_with="train_shards",
        must_match=["compare"],
    )
    shards_caption_key: str | None = _data(
        None,
        "The extension of the caption in the tars. Without it, the usual names are tried.",
        only_with="train_shards",
        must_match=["compare"],
    )
    allow_shell_urls: bool = _data(
        False,
        "Let --train_shards run shell commands (pipe: URLs). Use it only with addresses that you wrote yourself.",
        only_with="train_shards",
    )
    cached_data: str | None = _data(
        None,
        "The training data, as a folder that `python3 -m shared.prepare_data cache` made: images and captions that "
        "this base model's VAE and text encoders have encoded already. A step then needs neither.",
        names="data",
        must_match=["compare"],
    )
    generated_circles: int | None = _data(
        None,
        "Train on this many generated images of circles, as in fill50k, drawn at --resolution.",
        names="data",
        must_be=[at_least(1), at_most(10**7)],  # fill50k has 50,000
        must_match=["compare"],
    )
    image_column: str = _data("image", "The dataset's column with the target image.", must_match=["compare"])
    conditioning_image_column: tuple[str, ...] = _data(
        ("conditioning_image",),
        "The dataset's column with the condition image, or a column for each of several, whose channels stand side by "
        "side in this order in what the ControlNet takes.",
        must_match=["compare"],
    )
    caption_column: str = _data(
        "text", "The dataset's column with a caption, or a list of captions to choose from.", must_match=["compare"]
    )
    max_train_samples: int | None = _data(
        None,
        "Use at most this many training samples. Without it, all of them are used.",
        must_be=[at_least(1)],
        must_match=["resume", "compare"],
    )
    streaming: bool = _data(
        False, "Read the dataset while training, without downloading it first.", must_match=["compare"]
    )
    shuffle_buffer_size: int = _data(
        1000,
        "The number of samples that --streaming holds in memory to shuffle them.",
        must_be=[at_least(1)],
        must_match=["resume", "compare"],
    )
    max_skipped_samples: int = _data(
        100,
        "The number of unusable samples that are skipped and logged; one more stops the run.",
        must_be=[FROM_ZERO],
    )
    resolution: int = _data(
        512,
        "The side of the square training images, in pixels: images are resized to it, then cropped at the centre.",
        # The largest pictures that are opened have 89 million pixels.
        must_be=[at_least(1), _DIVISIBLE_BY_VAE_FACTOR, at_most(8192)],
        must_match=["resume", "compare"],
    )
    aspect_buckets: int | None = _data(
        None,
        "Train on pictures in at most this many shapes, up to twice as long as wide and of about as many pixels as the "
        "square of --resolution, each picture in the one that is nearest to its own, in place of the square for all. "
        "Every shape has its own compiled step.",
        must_be=[within(1, _MOST_BUCKETS)],
        must_match=["resume", "compare"],
    )
    image_interpolation_mode: InterpolationMode = _data(  # noqa: RUF009 (a name for a Literal)
        "bilinear", "The filter that resizes the images.", must_match=["resume", "compare"]
    )
    conditioning_interpolation: InterpolationMode | None = _data(  # noqa: RUF009
        None,
        "The filter that resizes the condition images: nearest for maps of labels, whose colours do not mix. Without "
        "it, that of the images.",
        must_match=["resume", "compare"],
    )
    conditioning_channels: tuple[int, ...] = _data(
        (3,),
        "The channels of a condition image: 3 for colours, 1 for grey; of several, a number for each in their order, "
        "or one for all. The ControlNet takes all of them together.",
        must_be=[CHANNELS_OF_A_PICTURE],
        must_match=["resume", "compare"],
    )
    random_crop: bool = _data(
        False,
        "Crop images and their conditions, both at the same place, at a random one in place of the centre.",
        must_match=["resume", "compare"],
    )
    random_flip: bool = _data(
        False,
        "Mirror half of the images, left for right, together with their conditions. Captions stay as they are.",
        must_match=["resume", "compare"],
    )
    mismatched_pairs: MismatchedPairs = _data(  # noqa: RUF009
        "skip",
        "What becomes of pairs whose image and condition are of different shapes: skip counts them among the unusable "
        "samples, resize stretches the condition over the image, crop crops either by itself, as diffusers does.",
        must_match=["compare"],  # a run that was begun before there was a choice may go on as it was
    )
    crops_coords_top_left_h: int = _data(
        0,
        "The top edge of the crop, in pixels, that Stable Diffusion XL is told about; other models know no crops.",
        must_be=[within(0, _LARGEST_CROP)],
        must_match=["resume", "compare"],
    )
    crops_coords_top_left_w: int = _data(
        0,
        "The left edge of the crop, in pixels, that Stable Diffusion XL is told about; other models know no crops.",
        must_be=[within(0, _LARGEST_CROP)],
        must_match=["resume", "compare"],
    )
    time_ids_from_data: bool = _data(
        False,
        "Tell Stable Diffusion XL of every image how large it was and where it is cropped, as its base model was "
        "trained (Podell et al. 2023, section 2.2), in place of the same sizes for all.",
        must_match=["resume", "compare"],
    )
    proportion_empty_prompts: float = _data(
        0.0,
        "The proportion of captions, from 0 to 1, that are replaced with the empty caption.",
        must_be=[within(0, 1)],
        must_match=["resume", "compare"],
    )
    dataloader_num_workers: int | None = _data(
        None,
        "The number of threads that prepare batches; with 0, the training process does it between steps. Without it, 0 "
        "on CPUs, which have other work, and beside TPUs and GPUs one less than there are processors, at most 16.",
        must_be=[FROM_ZERO, at_most(1024)],  # more than processors are of no use
    )

    seed: int = _training(
        0,
        "The seed of everything random: order, captions, noise, timesteps and new weights.",
        must_be=[within(0, 2**63 - 1)],
        must_match=["resume", "compare"],
    )
    num_train_epochs: int = _training(
        1,
        "The number of passes over the data, unless --max_train_steps is given.",
        must_be=[at_least(1), at_most(_MOST_STEPS)],
    )
    max_train_steps: int | None = _training(
        None,
        "The number of optimizer steps to train for; it takes precedence over --num_train_epochs.",
        must_be=[at_least(1), at_most(_MOST_STEPS)],
    )
    train_batch_size: int = _training(
        4, "The number of images per device in one forward and backward pass.", must_be=[at_least(1), at_most(2**16)]
    )
    gradient_accumulation_steps: int = _training(
        1, "The number of passes whose gradients make up one optimizer step.", must_be=[at_least(1), at_most(2**16)]
    )
    only_mid_control: bool = _training(
        False,
        "Control the UNet's middle block alone: less to compute, and more attention to the picture as a whole. The "
        "residuals of the ControlNet's down blocks are and stay zero.",
        must_match=["resume"],
        needs_whole_weights=True,
    )
    sd_unlocked: bool = _training(
        False,
        "Train the base model's decoder (up_blocks, conv_norm_out, conv_out) too, and save that UNet in the folder "
        "unet. It can harm the model: use a --learning_rate of 2e-6 or lower.",
        must_match=["resume"],
        needs_whole_weights=True,
    )
    snr_gamma: float | None = _training(
        None,
        "The gamma of Min-SNR loss weights; its paper recommends 5.0. Without it, all timesteps weigh the same.",
        must_be=[Rule(lambda gamma: 0 < gamma < math.inf, "a finite number, more than 0")],
        must_match=["compare"],
    )

    learning_rate: float = _optimizer(5e-6, "The learning rate after the warm-up.", must_be=[FROM_ZERO])
    scale_lr: bool = _optimizer(
        False, "Multiply the learning rate by the devices, the accumulation steps and the batch size per device."
    )
    lr_scheduler: ScheduleName = _optimizer(  # noqa: RUF009 (a name for a Literal)
        "constant", "The course of the learning rate."
    )
    lr_warmup_steps: int = _optimizer(
        500,
        "The number of optimizer steps over which the learning rate rises from 0; the constant schedule has none.",
        must_be=[FROM_ZERO],
    )
    lr_num_cycles: int = _optimizer(
        1, "The number of cosine cycles of the cosine_with_restarts schedule.", must_be=[at_least(1)]
    )
    lr_power: float = _optimizer(1.0, "The exponent of the polynomial schedule.", must_be=[FROM_ZERO])
    adam_beta1: float = _optimizer(
        0.9, "The decay, per optimizer step, of AdamW's mean of the gradients.", must_be=[BELOW_ONE]
    )
    adam_beta2: float = _optimizer(
        0.999, "The decay, per optimizer step, of AdamW's mean of the squared gradients.", must_be=[BELOW_ONE]
    )
    adam_epsilon: float = _optimizer(1e-8, "The constant that AdamW adds to its denominator.", must_be=[FROM_ZERO])
    adam_weight_decay: float = _optimizer(
        1e-2, "AdamW's weight decay, multiplied by the learning rate at each step.", must_be=[FROM_ZERO]
    )
    max_grad_norm: float = _optimizer(
        1.0,
        "The norm that the gradient is scaled down to where it is larger; inf turns clipping off.",
        must_be=[Rule(lambda norm: norm > 0, "more than 0 (inf turns clipping off)")],
    )
    use_8bit_adam: bool = _optimizer(
        False,
        "Hold the optimizer's moments in 8 bits (in PyTorch with bitsandbytes).",
    )
    set_grads_to_none: bool = _optimizer(
        False,
        "Free the gradients after each optimizer step rather than zeroing them.",
        flax=Equivalent("JAX keeps no gradients from one step to the next"),
    )
    use_ema: bool = _optimizer(
        False,
        "Keep a moving average of the trained weights, which validation and the final ControlNet use instead.",
        must_match=["resume"],
        needs_whole_weights=True,
    )

    validation_prompt: tuple[str, ...] | None = _validation(
        None,
        "The prompts of the validation images: as many as --validation_image, or one for all of those.",
        is_prompt=True,
    )
    validation_image: tuple[str, ...] | None = _validation(
        None,
        "The paths of the condition images for validation: as many as --validation_prompt, or one for all. Where "
        "samples have several, one of each in turn: depth_1.png canny_1.png depth_2.png canny_2.png.",
    )
    validation_steps: int = _validation(
        100, "The number of optimizer steps from one validation to the next.", must_be=[at_least(1)]
    )
    guidance_scale: float = _validation(
        7.5,
        "The strength of classifier-free guidance in images made during training, where 1 means none; diffusers' "
        "pipelines call it so too.",
        must_be=[Rule(lambda scale: 1 <= scale < math.inf, "a finite number, 1 (no guidance) or more")],
    )
    num_evaluation_samples: int = _validation(
        0,
        "The number of samples held out of the training data, on which every validation, and one before training, "
        "measures the denoising loss.",
        must_be=[FROM_ZERO],
        must_match=["compare"],
    )
    evaluation_fidelity: Literal["none", "circles", "edges"] = _validation(
        "none",
        "How to measure, at every validation, whether images made for the held-out conditions follow them: circles "
        "(IoU and colours, for --generated_circles), edges (precision, recall and F1 of Canny edges).",
    )
    num_validation_images: int = _validation(
        4,
        "The number of images made for each pair of prompt and condition.",
        must_be=[at_least(1), at_most(1000)],
    )

    output_dir: str = _checkpoints(
        "controlnet-model",
        "The run's folder: checkpoints, logs, the final ControlNet. {timestamp} in it becomes the time of the start.",
    )
    checkpointing_steps: int = _checkpoints(
        500, "The number of optimizer steps from one checkpoint to the next.", must_be=[at_least(1)]
    )
    checkpointing_seconds: float | None = _checkpoints(
        None,
        "Save a checkpoint also whenever so many seconds have passed since the last one was begun. It is deleted as "
        "soon as a newer one is complete.",
        must_be=[Rule(lambda seconds: 0 < seconds < math.inf, "a finite number, more than 0")],
    )
    checkpoints_total_limit: int | None = _checkpoints(
        None,
        "The number of checkpoints to keep, without those of --checkpointing_seconds; older ones are deleted. Without "
        "it, all are kept.",
        must_be=[at_least(1)],
    )
    resume_from_checkpoint: str | None = _checkpoints(
        None, "Continue from this checkpoint: its path, or latest for the newest whole one in --output_dir."
    )

    report_to: Literal["tensorboard", "wandb", "none"] = _logging("tensorboard", "Where figures and images are sent.")
    logging_dir: str = _logging("logs", "The folder of the TensorBoard events, inside --output_dir.")
    logging_steps: int = _logging(
        1,
        "The number of optimizer steps between two log entries; an entry is the mean over them.",
        must_be=[at_least(1)],
    )
    tracker_project_name: str = _logging("train_controlnet", "The name of the project in the tracker.")
    wandb_entity: str | None = _logging(None, "The Weights & Biases user or team that owns the run.")
    push_to_hub: bool = _logging(False, "Upload the final ControlNet and its model card to the Hub.")
    hub_model_id: str | None = _logging(
        None, "The Hub repository to upload to. Without it, the last part of --output_dir is its name."
    )
    hub_token: str | None = _logging(
        None,
        "The access token for the Hub, kept out of every file that the run writes. `hf auth login` is safer: other "
        "users of the machine can read command lines.",
        secret=True,
    )

    mixed_precision: Literal["no", "fp16", "bf16"] | None = _performance(
        None,
        "The number format of the frozen models and of the computation; ControlNet weights stay in float32. Without "
        "it, PyTorch takes that of accelerate's configuration, which is no unless it says otherwise; Flax takes no.",
    )
    gradient_checkpointing: bool = _performance(
        False, "Recompute activations in the backward pass: less memory, more time."
    )
    gradient_checkpointing_policy: Literal["everything", "all_but_products"] = _performance(
        "everything",
        "What --gradient_checkpointing recomputes: everything inside a layer, or all but the results of its linear "
        "layers and convolutions, which cost the most time.",
        torch=Missing("Leave it out; diffusers' models recompute everything.", value="all_but_products"),
    )
    enable_xformers_memory_efficient_attention: bool | None = _performance(
        None,
        "Use an attention that never holds the whole matrix of scores: xFormers' in PyTorch, the device's in Flax. "
        "PyTorch has one of its own without it, and so has Flax on TPUs and NVIDIA GPUs, unless it is turned off.",
        flax=Equivalent(
            "TPUs use splash attention and NVIDIA GPUs cuDNN's with or without it, other devices compute the scores in "
            "blocks with it; turned off, attention is plain"
        ),
    )
    enable_npu_flash_attention: bool = _performance(
        False, "Use the flash attention of Ascend NPUs.", flax=Missing("Leave it out; XLA's attention is used.")
    )
    allow_tf32: bool = _performance(
        False,
        "Let float32 matrix products run in TensorFloat-32 on NVIDIA GPUs, and in three bfloat16 passes, not six, on "
        "TPUs: faster, less exact.",
    )
    precompute_text: bool = _performance(
        False,
        "Encode all captions of the data once, before the first step, and keep the results on disk for this and later "
        "runs (controlnet-trainer/text in --cache_dir or, without it, in the user's cache folder): the text encoders "
        "then need no memory and no time in a step.",
    )
    torch_compile: bool = _performance(
        False,
        "Compile the UNet, the ControlNet, the VAE's encoder and the text encoders with torch.compile: minutes at the "
        "first start (see --ccache), faster steps after.",
        flax=Equivalent("JAX compiles every step as a whole anyway"),
    )
    parallelism: Literal["pmap", "mesh"] = _performance(
        "pmap",
        "How JAX uses several devices: pmap keeps a copy of everything on each, mesh can divide what is trained "
        "between them (--fsdp_devices).",
        torch=Missing(
            "Leave it out; start several processes with `accelerate launch`, and share a copy between them with "
            "torch_trainer/accelerate_configs/fsdp.yaml.",
            value="mesh",
        ),
    )
    fsdp_devices: int = _performance(
        1,
        "The number of devices that share one copy of the ControlNet and the optimizer's state: with --parallelism "
        "mesh, a divisor of the number of devices.",
        must_be=[at_least(1)],
    )
    coordinator_address: str | None = _performance(
        None,
        "HOST:PORT of process 0, where the processes of a JAX run on several hosts find each other; with "
        "--num_processes and --process_id. TPU pods need none of the three.",
        of_one_start=True,
        torch=Missing("Leave it out; `accelerate launch` starts several processes."),
    )
    num_processes: int | None = _performance(
        None,
        "The number of processes, one per host, of a JAX run.",
        must_be=[at_least(1), at_most(2**16)],
        of_one_start=True,
    )
    process_id: int | None = _performance(
        None, "The number of this process, from 0; another one on each host.", must_be=[FROM_ZERO], of_one_start=True
    )
    local_rank: int = _performance(
        -1,
        "The number of this process on its machine, -1 for a single process.",
        of_one_start=True,
        flax=Equivalent("JAX finds the processes itself and the value is ignored"),
        torch=Equivalent("accelerate finds the processes itself and the value is ignored"),
    )
    ccache: str | None = _performance(
        None,
        "The folder that keeps compiled programs (of --torch_compile, in PyTorch) for the next run, or none to keep "
        "nothing. Without it, JAX_COMPILATION_CACHE_DIR or TORCHINDUCTOR_CACHE_DIR names the folder, or, but for JAX "
        "on CPUs, it is controlnet-trainer/compiled in the user's cache folder.",
    )

    profile_steps: int = _profiling(
        0,
        "The number of optimizer steps to profile, from the third on, for TensorBoard's Profile tab; 0 for none.",
        must_be=[FROM_ZERO, at_most(10_000)],  # a profile is held in memory, some MB of each step
    )
    profile_validation: bool = _profiling(False, "Profile the last validation, for TensorBoard's Profile tab.")
    profile_memory: bool = _profiling(
        False,
        "Write what is in device memory before the first step and at the end to --output_dir: Flax to "
        "memory_initial.prof and memory_final.prof, for pprof; PyTorch, of NVIDIA and AMD GPUs alone, to "
        "memory_initial.pickle and memory_final.pickle, for https://pytorch.org/memory_viz.",
    )

    @property
    def num_conditions(self) -> int:
        """How many condition images a sample has."""
        if self.train_shards is not None:
            return 1 if self.shards_conditioning_key is None else len(self.shards_conditioning_key)
        # Data that have no columns say it with a number of channels for each.
        has_columns = self.dataset_name is not None or self.train_data_dir is not None
        return len(self.conditioning_image_column if has_columns else self.conditioning_channels)

    @property
    def channels_of_conditions(self) -> tuple[int, ...]:
        """Of each condition image of a sample, in their order."""
        channels = self.conditioning_channels
        return channels * self.num_conditions if len(channels) == 1 else channels

    @property
    def control_channels(self) -> int:
        """Of all condition images of a sample, side by side: what the ControlNet takes."""
        return sum(self.channels_of_conditions)

    @property
    def draws_pictures(self) -> bool:
        """Whether anything is sampled during the training."""
        return self.validation_image is not None or self.evaluation_fidelity != "none"

    @property
    def uses_vae(self) -> bool:
        """Whether the devices need one: to encode images, or to decode what is sampled."""
        return self.cached_data is None or self.draws_pictures

    @property
    def encodes_text_beforehand(self) -> bool:
        """Whether no step needs a text encoder."""
        return self.precompute_text or self.cached_data is not None


FLAGS: dict[str, Flag] = flags_of(TrainConfig)
SECRETS: frozenset[str] = frozenset(name for name, declared in FLAGS.items() if declared.secret)


_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def as_in_training(name: str) -> Any:
    """Declares a field of another program's configuration as the flag of that name here."""
    field = _FIELDS[name]
    return dataclasses.field(default=field.default, repr=field.repr, metadata=field.metadata)
