"""The configuration of a training run: one flat dataclass, one attribute per command-line flag.

The names, types and meanings are those of diffusers' train_controlnet_flax.py, train_controlnet.py and
train_controlnet_sdxl.py; where their defaults differ, the default here serves a first run on either backend.
"""

import dataclasses
from typing import Literal

from shared.config.flags import Flag, flags_in_group, flags_of

Backend = Literal["flax", "torch"]

_model = flags_in_group("model")
_data = flags_in_group("data")
_training = flags_in_group("training")
_optimizer = flags_in_group("optimizer")
_validation = flags_in_group("validation")
_checkpoints = flags_in_group("checkpoints")
_logging = flags_in_group("logging and hub")
_performance = flags_in_group("performance")
_profiling = flags_in_group("profiling")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything a run is told. Attribute names are flag names; lists are tuples; a step is an optimizer step.

    The dataclass itself checks nothing: `shared.config.validate` does.
    """

    pretrained_model_name_or_path: str | None = _model(
        None, "The base Stable Diffusion model: a folder in diffusers layout or a Hub repository."
    )
    controlnet_model_name_or_path: str | None = _model(
        None,
        "The ControlNet to start from: a folder or a Hub repository. Without it the ControlNet starts as a copy of the "
        "base model's UNet encoder with zero output layers.",
    )
    pretrained_vae_model_name_or_path: str | None = _model(
        None, "A VAE to use in place of the base model's: a folder or a Hub repository."
    )
    tokenizer_name: str | None = _model(
        None, "The tokenizer, a folder or a Hub repository, where it is not the base model's."
    )
    revision: str | None = _model(None, "The branch, tag or commit of the base model's repository.")
    variant: str | None = _model(None, "The variant of the base model's weight files, for example fp16.")
    controlnet_revision: str | None = _model(
        None, "The branch, tag or commit of the repository that --controlnet_model_name_or_path names."
    )
    from_pt: bool = _model(False, "Read the base model's PyTorch weights; both backends always do.")
    controlnet_from_pt: bool = _model(False, "Read the starting ControlNet's PyTorch weights; both backends always do.")
    cache_dir: str | None = _model(
        None, "The folder that keeps downloaded models and datasets. Without it, the Hub library's own folder is used."
    )

    dataset_name: str | None = _data(
        None, "The training data, as a Hub dataset or a folder that the datasets library can load by itself."
    )
    dataset_config_name: str | None = _data(None, "The configuration of --dataset_name, where it has several.")
    train_data_dir: str | None = _data(
        None,
        "The training data, as a local folder: an image folder, a folder with ControlNet's prompt.json, or, with "
        "--load_from_disk, a saved dataset.",
    )
    load_from_disk: bool = _data(False, "Read --train_data_dir as a dataset written by save_to_disk.")
    allowed_data_dirs: tuple[str, ...] | None = _data(
        None,
        "Folders outside of the training data's own in which its rows may name files. Without it, rows that lead out "
        "of the data's folder are skipped: whoever wrote the data should not choose among your other files.",
    )
    train_shards: tuple[str, ...] | None = _data(
        None, "The training data, as WebDataset tars: paths or URLs, with {000..127} ranges and * patterns."
    )
    shards_image_key: str | None = _data(
        None, "The extension of the target image in the tars. Without it, the usual names are tried."
    )
    shards_conditioning_key: str | None = _data(
        None, "The extension of the condition image in the tars. Without it, the usual names are tried."
    )
    shards_caption_key: str | None = _data(
        None, "The extension of the caption in the tars. Without it, the usual names are tried."
    )
    allow_shell_urls: bool = _data(
        False, "Let --train_shards run shell commands (pipe: URLs). Use it only with addresses that you wrote yourself."
    )
    generated_circles: int | None = _data(
        None, "Train on this many generated images of circles, as in fill50k, drawn at --resolution."
    )
    image_column: str = _data("image", "The dataset's column with the target image.")
    conditioning_image_column: str = _data("conditioning_image", "The dataset's column with the condition image.")
    caption_column: str = _data("text", "The dataset's column with a caption, or a list of captions to choose from.")
    max_train_samples: int | None = _data(
        None, "Use at most this many training samples. Without it, all of them are used."
    )
    streaming: bool = _data(False, "Read the dataset while training, without downloading it first.")
    shuffle_buffer_size: int = _data(1000, "The number of samples that --streaming holds in memory to shuffle them.")
    max_skipped_samples: int = _data(
        100, "The number of unreadable samples that are skipped and logged; one more stops the run."
    )
    resolution: int = _data(
        512, "The side of the square training images, in pixels: images are resized to it, then cropped at the centre."
    )
    image_interpolation_mode: Literal[
        "nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"
    ] = _data("bilinear", "The filter that resizes the images.")
    crops_coords_top_left_h: int = _data(
        0, "The top edge of the crop, in pixels, that Stable Diffusion XL is told about."
    )
    crops_coords_top_left_w: int = _data(
        0, "The left edge of the crop, in pixels, that Stable Diffusion XL is told about."
    )
    proportion_empty_prompts: float = _data(
        0.0, "The proportion of captions, from 0 to 1, that are replaced with the empty caption."
    )
    dataloader_num_workers: int = _data(
        0, "The number of threads that prepare batches; with 0, the training process does it between steps."
    )

    seed: int = _training(0, "The seed of everything random: order, captions, noise, timesteps and new weights.")
    num_train_epochs: int = _training(1, "The number of passes over the data, unless --max_train_steps is given.")
    max_train_steps: int | None = _training(
        None, "The number of optimizer steps to train for; it takes precedence over --num_train_epochs."
    )
    train_batch_size: int = _training(4, "The number of images per device in one forward and backward pass.")
    gradient_accumulation_steps: int = _training(1, "The number of passes whose gradients make up one optimizer step.")
    only_mid_control: bool = _training(
        False,
        "Control the UNet's middle block alone: less to compute, and more attention to the picture as a whole. The "
        "residuals of the ControlNet's down blocks are and stay zero.",
    )
    sd_unlocked: bool = _training(
        False,
        "Train the base model's decoder (up_blocks, conv_norm_out, conv_out) too, and save that UNet in the folder "
        "unet. It can harm the model: use a --learning_rate of 2e-6 or lower.",
    )
    snr_gamma: float | None = _training(
        None, "The gamma of Min-SNR loss weights; its paper recommends 5.0. Without it, all timesteps weigh the same."
    )

    learning_rate: float = _optimizer(5e-6, "The learning rate after the warm-up.")
    scale_lr: bool = _optimizer(
        False, "Multiply the learning rate by the devices, the accumulation steps and the batch size per device."
    )
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = _optimizer("constant", "The course of the learning rate.")
    lr_warmup_steps: int = _optimizer(
        500, "The number of optimizer steps over which the learning rate rises from 0; the constant schedule has none."
    )
    lr_num_cycles: int = _optimizer(1, "The number of cosine cycles of the cosine_with_restarts schedule.")
    lr_power: float = _optimizer(1.0, "The exponent of the polynomial schedule.")
    adam_beta1: float = _optimizer(0.9, "The decay, per optimizer step, of AdamW's mean of the gradients.")
    adam_beta2: float = _optimizer(0.999, "The decay, per optimizer step, of AdamW's mean of the squared gradients.")
    adam_epsilon: float = _optimizer(1e-8, "The constant that AdamW adds to its denominator.")
    adam_weight_decay: float = _optimizer(1e-2, "AdamW's weight decay, multiplied by the learning rate at each step.")
    max_grad_norm: float = _optimizer(
        1.0, "The norm that the gradient is scaled down to where it is larger; inf turns clipping off."
    )
    use_8bit_adam: bool = _optimizer(False, "Hold the optimizer's moments in 8 bits (bitsandbytes, NVIDIA GPUs).")
    set_grads_to_none: bool = _optimizer(
        False, "Free the gradients after each optimizer step rather than zeroing them."
    )
    use_ema: bool = _optimizer(
        False, "Keep a moving average of the trained weights, which validation and the final ControlNet use instead."
    )

    validation_prompt: tuple[str, ...] | None = _validation(
        None, "The prompts of the validation images: as many as --validation_image, or one for all of those."
    )
    validation_image: tuple[str, ...] | None = _validation(
        None, "The paths of the condition images for validation: as many as --validation_prompt, or one for all."
    )
    validation_steps: int = _validation(100, "The number of optimizer steps from one validation to the next.")
    guidance_scale: float = _validation(
        7.5,
        "The strength of classifier-free guidance in images made during training, where 1 means none; diffusers' "
        "pipelines call it so too.",
    )
    num_evaluation_samples: int = _validation(
        0,
        "The number of samples held out of the training data, on which every validation, and one before training, "
        "measures the denoising loss.",
    )
    evaluation_fidelity: Literal["none", "circles", "edges"] = _validation(
        "none",
        "How to measure, at every validation, whether images made for the held-out conditions follow them: circles "
        "(IoU and colours, for --generated_circles), edges (precision, recall and F1 of Canny edges).",
    )
    num_validation_images: int = _validation(4, "The number of images made for each pair of prompt and condition.")

    output_dir: str = _checkpoints(
        "controlnet-model",
        "The run's folder: checkpoints, logs, the final ControlNet. {timestamp} in it becomes the time of the start.",
    )
    checkpointing_steps: int = _checkpoints(500, "The number of optimizer steps from one checkpoint to the next.")
    checkpoints_total_limit: int | None = _checkpoints(
        None, "The number of checkpoints to keep; older ones are deleted. Without it, all are kept."
    )
    resume_from_checkpoint: str | None = _checkpoints(
        None, "Continue from this checkpoint: its path, or latest for the newest one in --output_dir."
    )

    report_to: Literal["tensorboard", "wandb", "none"] = _logging("tensorboard", "Where figures and images are sent.")
    logging_dir: str = _logging("logs", "The folder of the TensorBoard events, inside --output_dir.")
    logging_steps: int = _logging(
        1, "The number of optimizer steps between two log entries; an entry is the mean over them."
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
    )
    enable_xformers_memory_efficient_attention: bool = _performance(
        False, "Use an attention that never holds the whole matrix of scores."
    )
    enable_npu_flash_attention: bool = _performance(False, "Use the flash attention of Ascend NPUs.")
    allow_tf32: bool = _performance(
        False,
        "Let float32 matrix products run in TensorFloat-32 on NVIDIA GPUs, and in three bfloat16 passes, not six, on "
        "TPUs: faster, less exact.",
    )
    torch_compile: bool = _performance(
        False, "Compile the UNet and the ControlNet with torch.compile: minutes at the start, faster steps after."
    )
    parallelism: Literal["pmap", "mesh"] = _performance(
        "pmap",
        "How JAX uses several devices: pmap keeps a copy of everything on each, mesh can divide what is trained "
        "between them (--fsdp_devices).",
    )
    fsdp_devices: int = _performance(
        1,
        "The number of devices that share one copy of the ControlNet and the optimizer's state: with --parallelism "
        "mesh, a divisor of the number of devices.",
    )
    coordinator_address: str | None = _performance(
        None,
        "HOST:PORT of process 0, where the processes of a JAX run on several hosts find each other; with "
        "--num_processes and --process_id. TPU pods need none of the three.",
    )
    num_processes: int | None = _performance(None, "The number of processes, one per host, of a JAX run.")
    process_id: int | None = _performance(None, "The number of this process, from 0; another one on each host.")
    local_rank: int = _performance(-1, "The number of this process on its machine, -1 for a single process.")
    ccache: str | None = _performance(
        None,
        "The folder that keeps JAX's compiled programs for the next run, or none to keep nothing. Without it, "
        "JAX_COMPILATION_CACHE_DIR names the folder, or, but on CPUs, it is controlnet-trainer/compiled in the user's "
        "cache folder.",
    )

    profile_steps: int = _profiling(
        0, "The number of optimizer steps to profile, from the third on, for TensorBoard's Profile tab; 0 for none."
    )
    profile_validation: bool = _profiling(False, "Profile the last validation, for TensorBoard's Profile tab.")
    profile_memory: bool = _profiling(
        False,
        "Write what is in device memory before the first step and at the end to memory_initial.prof and "
        "memory_final.prof in --output_dir, for pprof.",
    )


FLAGS: dict[str, Flag] = flags_of(TrainConfig)
SECRETS: frozenset[str] = frozenset(field.name for field in dataclasses.fields(TrainConfig) if not field.repr)
