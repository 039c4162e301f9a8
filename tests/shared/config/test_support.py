"""What each backend refuses for now, and what it honours in its own way."""

import dataclasses
from typing import Any, get_args

import pytest

from shared.config import Backend, TrainConfig, notices, validate
from shared.config.flags import Missing
from shared.config.options import FLAGS
from shared.config.support import BACKEND_NAMES, missing_in

_CONFIG = TrainConfig(
    pretrained_model_name_or_path="model", dataset_name="data", gradient_checkpointing=True, num_evaluation_samples=1
)
_ANOTHER_VALUE: dict[type, Any] = {bool: True, int: 1, str: "text"}
_WITH_IT = {"coordinator_address": {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 0}}


def _asking_for(name: str, missing: Missing) -> TrainConfig:
    value = missing.value if missing.value is not None else _ANOTHER_VALUE[FLAGS[name].kind]
    return dataclasses.replace(_CONFIG, **{name: value, **_WITH_IT.get(name, {})})


@pytest.mark.parametrize(
    ("backend", "name", "missing"),
    [(backend, *row) for backend in get_args(Backend) for row in missing_in(backend).items()],
    ids=lambda value: "" if isinstance(value, Missing) else value,
)
def test_a_flag_that_a_backend_lacks_is_refused_there_alone(backend: Backend, name: str, missing: Missing) -> None:
    told = f"--{name}.* is not supported yet by the {BACKEND_NAMES[backend]} backend: "
    with pytest.raises(ValueError, match=told) as refusal:
        validate(_asking_for(name, missing), backend)
    assert str(refusal.value).endswith(missing.advice)
    other: Backend = "torch" if backend == "flax" else "flax"
    if name not in missing_in(other):
        validate(_asking_for(name, missing), other)


def test_only_the_unsupported_value_is_refused() -> None:
    policy = FLAGS["gradient_checkpointing_policy"]
    refused = {missing_in("torch")[policy.name].value}
    for value in set(policy.choices) - refused:
        validate(dataclasses.replace(_CONFIG, gradient_checkpointing_policy=value), "torch")


@pytest.mark.parametrize("mixed_precision", FLAGS["mixed_precision"].choices)
def test_both_backends_take_every_precision(mixed_precision: Any) -> None:
    for backend in get_args(Backend):
        validate(dataclasses.replace(_CONFIG, mixed_precision=mixed_precision), backend)


def test_every_other_flag_of_diffusers_scripts_passes_in_flax() -> None:
    config = dataclasses.replace(
        _CONFIG,
        pretrained_vae_model_name_or_path="vae",
        from_pt=True,
        snr_gamma=5.0,
        streaming=True,
        max_train_steps=1000,
        report_to="wandb",
        dataloader_num_workers=4,
        mixed_precision="bf16",
    )
    validate(config, "flax")


@pytest.mark.parametrize(
    "changes", [{"from_pt": True}, {"controlnet_from_pt": True}, {"set_grads_to_none": True}, {"torch_compile": True}]
)
def test_a_flag_honoured_otherwise_is_noticed_in_one_line(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(_CONFIG, **changes)
    validate(config, "flax")
    (notice,) = notices(config, "flax")
    assert notice.startswith(f"--{next(iter(changes))}: ")
    assert "\n" not in notice
    assert notices(config, "torch") == []


def test_the_launcher_tells_the_processes_their_numbers() -> None:
    for backend in get_args(Backend):
        (notice,) = notices(dataclasses.replace(_CONFIG, local_rank=0), backend)
        assert notice.startswith("--local_rank: ")


def test_the_defaults_need_no_notice() -> None:
    for backend in get_args(Backend):
        assert notices(_CONFIG, backend) == []
