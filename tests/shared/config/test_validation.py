"""What a configuration may not be, on any backend."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.config import Backend, TrainConfig, validate
from shared.config.options import FLAGS

_RIGHT = TrainConfig(pretrained_model_name_or_path="model", dataset_name="data")
_SHARDS: dict[str, Any] = {"dataset_name": None, "train_shards": ("a.tar",)}


def _check(backend: Backend = "torch", **changes: Any) -> None:
    validate(dataclasses.replace(_RIGHT, **changes), backend)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dataset_name": None, "train_data_dir": "folder"},
        {"dataset_name": None, "train_data_dir": "folder", "load_from_disk": True},
        {"dataset_name": None, "generated_circles": 8},
        {"dataset_config_name": "small"},
        {"streaming": True, "max_train_steps": 10},
        {"streaming": True, "max_train_samples": 100},
        {**_SHARDS, "streaming": True, "shards_image_key": "png", "max_train_steps": 10, "max_train_samples": 100},
        {**_SHARDS, "train_shards": ("pipe:cat a.tar",), "allow_shell_urls": True},
        {**_SHARDS, "train_shards": ("pipe.tar", "pipes:x"), "allow_shell_urls": False},
        {"validation_prompt": ("a", ""), "validation_image": ("x", "y")},
        {"validation_prompt": ("a",), "validation_image": ("x", "y", "z")},
        {"validation_prompt": ("a", "b"), "validation_image": ("x",)},
        {"report_to": "wandb"},
        {"hub_token": "hf_abc", "push_to_hub": True},
        {"proportion_empty_prompts": 1.0, "adam_beta1": 0.0, "max_grad_norm": float("inf"), "learning_rate": 0.0},
        {"image_interpolation_mode": "nearest_exact", "lr_scheduler": "polynomial", "resolution": 8},
    ],
)
def test_right_configurations_pass(changes: dict[str, Any]) -> None:
    _check(**changes)


@pytest.mark.parametrize(
    ("changes", "explanation"),
    [
        ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
        (
            {"dataset_name": None},
            "give one of --dataset_name, --train_data_dir, --train_shards, --cached_data, --generated_circles",
        ),
        ({"train_data_dir": "folder"}, "--dataset_name and --train_data_dir each name training data"),
        ({"generated_circles": 8}, "--dataset_name and --generated_circles"),
        ({**_SHARDS, "generated_circles": 3}, "--train_shards and --generated_circles each name training data"),
        ({"load_from_disk": True}, "--load_from_disk needs --train_data_dir"),
        ({**_SHARDS, "dataset_config_name": "small"}, "--dataset_config_name needs --dataset_name"),
        ({"shards_caption_key": "txt"}, "--shards_caption_key is about --train_shards"),
        ({"allow_shell_urls": True}, "--allow_shell_urls is about --train_shards"),
        ({**_SHARDS, "train_shards": ("a.tar", "pipe:cat b.tar")}, "add --allow_shell_urls"),
        ({**_SHARDS, "train_shards": ("PIPE:cat b.tar",)}, "'PIPE:…' would run a shell command.*--allow_shell_urls"),
        ({"streaming": True}, "cannot say when to stop: give --max_train_steps or --max_train_samples"),
        ({"streaming": True, "num_train_epochs": 3}, "--num_train_epochs cannot say when to stop"),
        ({**_SHARDS, "streaming": True}, "give --max_train_steps or --max_train_samples"),
        (
            {"dataset_name": None, "train_data_dir": "folder", "streaming": True},
            "give --max_train_steps or --max_train_samples",
        ),
        (
            {"dataset_name": None, "train_data_dir": "folder", "load_from_disk": True, "streaming": True},
            "--streaming does not go with --load_from_disk",
        ),
        ({"dataset_name": None, "generated_circles": 8, "streaming": True}, "--streaming does not go with"),
        ({"validation_prompt": ("a",)}, "--validation_prompt needs --validation_image"),
        ({"validation_image": ("x",)}, "--validation_image needs --validation_prompt"),
        (
            {"validation_prompt": ("a", "b"), "validation_image": ("x", "y", "z")},
            "--validation_prompt has 2 values and --validation_image 3",
        ),
        (
            {"time_ids_from_data": True, "crops_coords_top_left_w": 5},
            "--crops_coords_top_left_w is 5.*--time_ids_from_data counts every image's own",
        ),
        ({"report_to": "wandb", "hub_token": "hf_abc"}, "--hub_token cannot be given with --report_to wandb"),
        ({"report_to": "all"}, "--report_to must be one of tensorboard, wandb, none"),
        ({"image_interpolation_mode": "cubic"}, "--image_interpolation_mode must be one of"),
        ({"lr_scheduler": "cubic"}, "--lr_scheduler must be one of linear, cosine, cosine_with_restarts.*'cubic'"),
        ({"resolution": 500}, "--resolution must be divisible by 8"),
        ({"output_dir": ""}, "--output_dir was given an empty value"),
        (
            {"output_dir": "gs://user:password@bucket/run"},
            "--output_dir is 'gs://bucket/run', an address; expected a folder",
        ),
        ({"pretrained_model_name_or_path": ""}, "check that it is set"),
        ({"validation_prompt": ("a",), "validation_image": ("",)}, "--validation_image was given an empty value"),
    ],
)
def test_wrong_configurations_are_refused_with_the_way_out(changes: dict[str, Any], explanation: str) -> None:
    with pytest.raises(ValueError, match=explanation):
        _check(**changes)


_THREE: dict[str, Any] = {"coordinator_address": "10.0.0.2:8476", "num_processes": 2, "process_id": 1}


def test_devices_and_processes_of_jax() -> None:
    _check("flax", **_THREE, parallelism="mesh", fsdp_devices=4)


@pytest.mark.parametrize(
    ("changes", "explanation"),
    [
        ({"fsdp_devices": 4}, "--fsdp_devices 4 needs --parallelism mesh"),
        ({"fsdp_devices": 0, "parallelism": "mesh"}, "--fsdp_devices must be 1 or more"),
        ({"parallelism": "fsdp"}, "--parallelism must be one of pmap, mesh"),
        *(({name: _THREE[name]}, "are missing: .* Give all three") for name in _THREE),
        *(({**_THREE, name: None}, f"--{name} is missing: .* Give all three") for name in _THREE),
        ({**_THREE, "process_id": 2}, "--process_id is 2, but --num_processes 2 are numbered from 0 to 1"),
        ({**_THREE, "process_id": -1}, "--process_id must be"),
        ({**_THREE, "num_processes": 0}, "--num_processes must be 1 or more"),
        *(
            ({**_THREE, "coordinator_address": address}, "expected HOST:PORT")
            for address in ("10.0.0.2", ":8476", "10.0.0.2:", "10.0.0.2:port", "10.0.0.2:70000")
        ),
    ],
)
def test_wrong_devices_and_processes_are_refused(changes: dict[str, Any], explanation: str) -> None:
    with pytest.raises(ValueError, match=explanation):
        _check("flax", **changes)


@pytest.mark.parametrize("command", ["curl -H SECRET", "TOKEN=SECRET curl", "curl\tSECRET", "curl<SECRET"])
def test_a_command_that_is_refused_is_not_quoted(command: str) -> None:
    with pytest.raises(ValueError, match="would run a shell command") as refusal:
        _check(**{**_SHARDS, "train_shards": (f"pipe:{command}",)})
    assert "SECRET" not in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    [
        *("resolution", "train_batch_size", "num_train_epochs", "max_train_steps", "max_train_samples"),
        *("gradient_accumulation_steps", "checkpointing_steps", "checkpoints_total_limit", "logging_steps"),
        *("validation_steps", "num_validation_images", "lr_num_cycles", "shuffle_buffer_size", "generated_circles"),
    ],
)
@given(value=st.integers(max_value=0))
def test_counts_are_positive(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"--{name} must be 1 or more, but it is {value}"):
        _check(**{name: value})


@pytest.mark.parametrize(
    ("name", "smallest", "largest"),
    [
        ("proportion_empty_prompts", 0.0, 1.0),
        ("adam_beta1", 0.0, 1.0 - 2**-53),
        ("adam_beta2", 0.0, 1.0 - 2**-53),
        ("learning_rate", 0.0, 1.7976931348623157e308),
        ("adam_epsilon", 0.0, 1.7976931348623157e308),
        ("adam_weight_decay", 0.0, 1.7976931348623157e308),
        ("lr_power", 0.0, 1.7976931348623157e308),
        ("snr_gamma", 5e-324, 1.7976931348623157e308),
        ("checkpointing_seconds", 5e-324, 1.7976931348623157e308),
        ("max_grad_norm", 5e-324, float("inf")),
    ],
)
@given(value=st.floats())
def test_numbers_stay_in_their_ranges(name: str, smallest: float, largest: float, value: float) -> None:
    if smallest <= value <= largest:
        _check(**{name: value})
    else:
        with pytest.raises(ValueError, match=f"--{name} must be "):
            _check(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**63),
        ("dataloader_num_workers", -1),
        ("lr_warmup_steps", -1),
        ("max_skipped_samples", -1),
        ("profile_steps", -1),
        ("crops_coords_top_left_h", -1),
        ("crops_coords_top_left_w", -1),
    ],
)
def test_whole_numbers_stay_in_their_ranges(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"--{name} must be .*, but it is {value}"):
        _check(**{name: value})


_TWO_CONDITIONS: dict[str, Any] = {"conditioning_image_column": ("depth", "canny")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_image": ("a",) * 3, "validation_prompt": ("x",)}, "names 3 images, and there are 2 conditions"),
        (
            {"validation_image": ("a",) * 4, "validation_prompt": ("x",) * 4},
            r"--validation_prompt has 4 values and --validation_image 2 \(of 2 images each\)",
        ),
        ({"evaluation_fidelity": "edges", "num_evaluation_samples": 1}, "with one condition, and there are 2"),
        ({"conditioning_channels": (1, 2)}, "--conditioning_channels must be 1 or 3, but it is 2"),
    ],
)
def test_several_conditions(changes: dict[str, Any], message: str) -> None:
    for images, prompts in ((2, 3), (4, 2), (6, 1)):
        _check(**_TWO_CONDITIONS, validation_image=("a",) * images, validation_prompt=("x",) * prompts)
    with pytest.raises(ValueError, match=message):
        _check(**_TWO_CONDITIONS | changes)


_ONLY_COMPARED_WITH = {  # so that a large number costs nothing
    *("max_train_samples", "shuffle_buffer_size", "max_skipped_samples", "seed", "lr_warmup_steps", "lr_num_cycles"),
    *("validation_steps", "num_evaluation_samples", "checkpointing_steps", "logging_steps", "checkpoints_total_limit"),
    "local_rank",
}
_COUNTS = sorted(flag.name for flag in FLAGS.values() if flag.kind is int and flag.name not in _ONLY_COMPARED_WITH)


@pytest.mark.parametrize("name", _COUNTS)
def test_no_whole_number_is_too_large_for_a_sentence(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name} "):
        _check(**{name: (2**63 - 8,) if FLAGS[name].is_list else 2**63 - 8})


def test_a_batch_has_a_size_that_memory_can_have() -> None:
    _check(train_batch_size=2**13, resolution=1024)
    with pytest.raises(ValueError, match=r"--train_batch_size 65536 images of --resolution 8192 fit into no memory"):
        _check(train_batch_size=2**16, resolution=8192)


@pytest.mark.parametrize(
    "address",
    [
        *("10.0.0.2:٨٤٧٦", "host:" + "9" * 5000, "host:0", "unix:/tmp/socket:80", "dns:///host:80", "::1:8476"),
        *("[::1]", "a b:80", "user:password@host:80", "host:80\n", "[host]:80", "host:+80", "host:8_0"),
    ],
)
def test_an_address_is_a_host_and_a_port_in_plain_digits(address: str) -> None:
    with pytest.raises(ValueError, match="expected HOST:PORT") as refusal:
        _check("flax", **{**_THREE, "coordinator_address": address})
    assert "password" not in str(refusal.value)


@pytest.mark.parametrize(
    "address", ["[::1]:8476", "[fe80::1%eth0]:80", "host-0.example:65535", "localhost:1", "a_b:80"]
)
def test_hosts_may_be_names_and_addresses_of_either_kind(address: str) -> None:
    _check("flax", **{**_THREE, "coordinator_address": address})


@pytest.mark.parametrize("name", [flag.name for flag in FLAGS.values() if flag.choices])
def test_a_token_in_a_choices_place_is_not_quoted(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name} must be one of .*, but it is a text of 37 characters"):
        _check(**{name: "hf_" + "S" * 34})


def test_a_checkpointing_policy_needs_checkpointing() -> None:
    policy = {"gradient_checkpointing_policy": "all_but_products"}
    with pytest.raises(ValueError, match="needs --gradient_checkpointing"):
        validate(dataclasses.replace(_RIGHT, **policy), "flax")
    validate(dataclasses.replace(_RIGHT, **policy, gradient_checkpointing=True), "flax")
