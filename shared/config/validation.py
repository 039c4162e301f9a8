"""The checks that need nothing but the configuration itself: no files, no models, no devices."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from shared.config.flags import Backend, Flag
from shared.config.options import FLAGS, MOST_CONDITIONS, TrainConfig
from shared.config.support import check_support
from shared.outgoing.redaction import described, is_shell_command, redacted
from shared.untrusted import shown
from shared.user_errors import UserError

DATA_SOURCES = [name for name, flag in FLAGS.items() if flag.names == "data"]
_PROCESSES = ("coordinator_address", "num_processes", "process_id")
_ADDRESS = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%\w+)?\]):(?P<port>[0-9]{1,5})")
_LARGEST_PIXELS = 2**33  # of a device's batch: 8192 images of 1024 px, 24 GiB in the host's memory


def validate(config: TrainConfig, backend: Backend) -> None:
    """Check a configuration for a backend, before any file, model or device is touched.

    The checks that diffusers' three ControlNet scripts make are among them, except that streaming needs
    --max_train_samples only where --max_train_steps is not given.

    Raises:
        UserError: for the first mistake found, with what was given, what was expected and how to fix it.
    """
    check_values(config, FLAGS)
    _check_batch_fits(config)
    check_output_dir(config.output_dir)
    _check_sources(config)
    _check_crops(config)
    _check_validation_pairs(config)
    _check_evaluation(config)
    _check_checkpointing(config)
    _check_profiling(config)
    _check_devices(config)
    _check_processes(config)
    _check_secrets(config)
    check_support(config, backend)


def check_values(config: Any, flags: Mapping[str, Flag]) -> None:
    """Hold each value against what is declared of its flag.

    Raises:
        UserError: for the first that does not keep to it.
    """
    for flag in flags.values():
        value = getattr(config, flag.name)
        texts = value if flag.is_list and value is not None else (value,)
        # An empty prompt means something; any other empty text is a shell variable that was never set.
        if flag.kind is str and not flag.is_prompt and "" in texts:
            raise UserError(
                f"--{flag.name} was given an empty value. Give it one or leave the flag out; "
                "if the value is a shell variable, check that it is set."
            )
        for text in texts:
            if flag.choices and text not in flag.choices and not (flag.is_optional and text is None):
                raise UserError(f"--{flag.name} must be one of {', '.join(flag.choices)}, but it is {described(text)}.")
    for flag in flags.values():
        value = getattr(config, flag.name)
        numbers = value if flag.is_list and value is not None else (value,)
        for rule in flag.must_be:
            for number in numbers:
                if number is not None and not rule.is_kept_by(number):
                    raise UserError(f"--{flag.name} must be {rule.words}, but it is {number}.")


def _check_batch_fits(config: TrainConfig) -> None:
    if config.train_batch_size * config.resolution**2 > _LARGEST_PIXELS:
        raise UserError(
            f"--train_batch_size {config.train_batch_size} images of --resolution {config.resolution} fit into no "
            "memory: give less of one, and --gradient_accumulation_steps in its place."
        )


def check_output_dir(output_dir: str) -> None:
    """Raises UserError for what is no folder of this machine."""
    if "://" in output_dir:
        raise UserError(
            f"--output_dir is {shown(redacted(output_dir))!r}, an address; expected a folder of this "
            "machine. Mount the bucket and give the folder that it is mounted on."
        )


def _check_sources(config: TrainConfig) -> None:
    if config.pretrained_model_name_or_path is None:
        raise UserError(
            "--pretrained_model_name_or_path is missing: name the base model, "
            "for example stable-diffusion-v1-5/stable-diffusion-v1-5 or a folder."
        )
    check_sources(config)
    if config.streaming and config.max_train_steps is None and config.max_train_samples is None:
        raise UserError(
            "--streaming does not know how many samples there are, so --num_train_epochs cannot say when to stop: give "
            "--max_train_steps or --max_train_samples."
        )


def check_sources(config: TrainConfig, names: Sequence[str] = DATA_SOURCES) -> None:
    """Raises UserError where the data that a configuration names are none, several, or named in part.

    `names` are the flags that may name them.
    """
    given = [f"--{name}" for name in names if getattr(config, name) is not None]
    if not given:
        sources = ", ".join(f"--{name}" for name in names)
        raise UserError(f"The training data are missing: give one of {sources}.")
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} each name training data, and a run trains on one source: keep one of them. "
            "(To load a local folder with the datasets library, --dataset_name takes its path.)"
        )
    _check_source_details(config)
    _check_conditions(config)
    if config.cached_data is not None:
        check_one_view(config, "--cached_data holds one view of each picture")
    _check_buckets(config)


def check_one_view(config: TrainConfig, because: str) -> None:
    """Raises UserError where a picture is to be seen otherwise each time."""
    for name in ("random_flip", "random_crop"):
        if getattr(config, name):
            raise UserError(f"{because}: leave --{name} out, or train from the pictures.")


def _check_buckets(config: TrainConfig) -> None:
    if config.aspect_buckets is None:
        return
    if config.streaming:
        raise UserError(
            "--aspect_buckets groups pictures by their shapes, which --streaming learns one by one: leave one of the "
            "two out."
        )
    if config.cached_data is not None:
        raise UserError(
            "--aspect_buckets does not go with --cached_data, which holds squares: leave it out, or train from the "
            "pictures."
        )


def _check_source_details(config: TrainConfig) -> None:
    if config.load_from_disk and config.train_data_dir is None:
        raise UserError("--load_from_disk needs --train_data_dir, the folder that save_to_disk wrote.")
    if config.dataset_config_name is not None and config.dataset_name is None:
        raise UserError("--dataset_config_name needs --dataset_name, the dataset that it is a configuration of.")
    for name, flag in FLAGS.items():
        other = flag.only_with
        if other is not None and getattr(config, name) != flag.default and getattr(config, other) is None:
            raise UserError(f"--{name} is about --{other}, which is not given: give that too, or leave it out.")
    for source in ("load_from_disk", "generated_circles"):
        if config.streaming and getattr(config, source):
            raise UserError(f"--streaming does not go with --{source}, which downloads nothing: leave one out.")
    for url in config.train_shards or ():  # as written; what braces make of it is seen when the shards are opened
        if is_shell_command(url) and not config.allow_shell_urls:
            scheme = url.strip().partition(":")[0]
            raise UserError(
                f"--train_shards '{scheme}:…' would run a shell command. If you wrote it yourself, add "
                "--allow_shell_urls."
            )


def _check_conditions(config: TrainConfig) -> None:
    columns, count = len(config.conditioning_image_column), config.num_conditions
    if columns > 1 and config.train_shards is not None:
        raise UserError(
            f"--conditioning_image_column names {columns} columns, and --train_shards has none: name the extensions of "
            "the condition images with --shards_conditioning_key."
        )
    if columns > 1 and config.cached_data is not None:
        raise UserError(
            f"--conditioning_image_column names {columns} columns, and --cached_data has none: leave it out, and give "
            "--conditioning_channels a number for each condition image."
        )
    if config.generated_circles is not None and max(columns, count) > 1:
        raise UserError(
            "--generated_circles draws one condition image, the outline: give one value of --conditioning_channels, "
            "and leave --conditioning_image_column out."
        )
    if count > MOST_CONDITIONS:
        raise UserError(
            f"{count} condition images of a sample are named, and a ControlNet takes at most {MOST_CONDITIONS} here: "
            "name fewer."
        )
    if len(config.conditioning_channels) not in (1, count):
        named_by = "shards_conditioning_key" if config.train_shards is not None else "conditioning_image_column"
        raise UserError(
            f"--conditioning_channels has {len(config.conditioning_channels)} values and --{named_by} {count}: give a "
            "number for each condition image, or one for all."
        )


def _check_crops(config: TrainConfig) -> None:
    for name in ("crops_coords_top_left_h", "crops_coords_top_left_w"):
        if config.time_ids_from_data and getattr(config, name):
            raise UserError(
                f"--{name} is {getattr(config, name)}, an edge of the crop for all images, and --time_ids_from_data "
                "counts every image's own: leave one of the two out."
            )


def _check_evaluation(config: TrainConfig) -> None:
    if config.evaluation_fidelity != "none" and config.num_evaluation_samples == 0:
        raise UserError(
            f"--evaluation_fidelity {config.evaluation_fidelity} measures on held-out samples and there are none: "
            "say how many with --num_evaluation_samples."
        )
    if config.evaluation_fidelity == "circles" and config.generated_circles is None:
        raise UserError(
            "--evaluation_fidelity circles needs --generated_circles, whose true circles are known. For other data, "
            "choose edges or none."
        )
    if config.evaluation_fidelity == "edges" and config.num_conditions > 1:
        raise UserError(
            f"--evaluation_fidelity edges compares pictures with one condition, and there are {config.num_conditions}: "
            "leave it out."
        )


def _check_validation_pairs(config: TrainConfig) -> None:
    for given, missing in (("prompt", "image"), ("image", "prompt")):
        if getattr(config, f"validation_{given}") is not None and getattr(config, f"validation_{missing}") is None:
            raise UserError(f"--validation_{given} needs --validation_{missing}: give both, or neither.")
    prompts, images = len(config.validation_prompt or ()), len(config.validation_image or ())
    check_whole_groups("validation_image", images, config.num_conditions)
    images //= config.num_conditions
    if prompts != images and 1 not in (prompts, images):
        raise UserError(
            f"--validation_prompt has {prompts} values and --validation_image {images}{_each(config.num_conditions)}: "
            "give as many of one as of the other, or a single one of either."
        )


def check_whole_groups(flag: str, given: int, conditions: int) -> None:
    """Raises UserError where a flag names condition images that do not make up groups of one of each."""
    if given % conditions:
        raise UserError(
            f"--{flag} names {given} images, and there are {conditions} conditions: give one of each in turn, such as "
            "depth_1.png canny_1.png depth_2.png canny_2.png."
        )


def _each(conditions: int) -> str:
    return f" (of {conditions} images each)" if conditions > 1 else ""


def _check_checkpointing(config: TrainConfig) -> None:
    default = FLAGS["gradient_checkpointing_policy"].default
    if config.gradient_checkpointing_policy != default and not config.gradient_checkpointing:
        raise UserError("--gradient_checkpointing_policy needs --gradient_checkpointing: give that too, or neither.")


def _check_profiling(config: TrainConfig) -> None:
    if config.profile_validation and config.validation_image is None and config.num_evaluation_samples == 0:
        raise UserError(
            "--profile_validation finds no validation to profile: give --validation_image and --validation_prompt, or "
            "--num_evaluation_samples."
        )


def _check_devices(config: TrainConfig) -> None:
    if config.fsdp_devices > 1 and config.parallelism != "mesh":
        raise UserError(
            f"--fsdp_devices {config.fsdp_devices} needs --parallelism mesh: pmap keeps a whole copy on every device. "
            "Give that too, or leave it out."
        )


def _check_processes(config: TrainConfig) -> None:
    address, count, number = config.coordinator_address, config.num_processes, config.process_id
    missing = [f"--{name}" for name in _PROCESSES if getattr(config, name) is None]
    if len(missing) == len(_PROCESSES):
        return
    if address is None or count is None or number is None:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: --coordinator_address, "
            "--num_processes and --process_id go together. Give all three on every host, or none on a TPU pod."
        )
    if number >= count:
        raise UserError(
            f"--process_id is {number}, but --num_processes {count} are numbered from 0 to {count - 1}: give each host "
            "one of these."
        )
    parts = _ADDRESS.fullmatch(address)
    if parts is None or not 0 < int(parts["port"]) < 65536:
        raise UserError(
            f"--coordinator_address is {described(address)}; expected HOST:PORT, such as 10.0.0.2:8476: "
            "the address of the host of process 0, and a free port there."
        )


def _check_secrets(config: TrainConfig) -> None:
    if config.report_to == "wandb" and config.hub_token is not None:
        raise UserError(
            "--hub_token cannot be given with --report_to wandb, which records command lines and would expose it. "
            "Leave it out and log in with `hf auth login` or the environment variable HF_TOKEN."
        )
