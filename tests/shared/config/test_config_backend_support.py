"""What each backend refuses for now, and what it honours in its own way."""

import dataclasses
from typing import Any

import pytest

from shared.config import TrainConfig, notices, validate
from shared.config.options import FLAGS
from shared.config.support import NOT_SUPPORTED, Missing

_CONFIG = TrainConfig(pretrained_model_name_or_path="model", dataset_name="data")
_ANOTHER_VALUE: dict[type, Any] = {bool: True, int: 1, str: "text"}


def _asking_for(row: Missing) -> TrainConfig:
    value = row.value if row.value is not None else _ANOTHER_VALUE[FLAGS[row.flag].kind]
    return dataclasses.replace(_CONFIG, **{row.flag: value})


@pytest.mark.parametrize("row", NOT_SUPPORTED["flax"], ids=lambda row: row.flag)
def test_a_flag_that_flax_lacks_is_refused_there_alone(row: Missing) -> None:
    with pytest.raises(ValueError, match=f"--{row.flag}.* is not supported yet by the Flax backend: ") as refusal:
        validate(_asking_for(row), "flax")
    assert str(refusal.value).endswith(row.advice)
    validate(_asking_for(row), "torch")


def test_only_the_unsupported_value_is_refused() -> None:
    for mixed_precision in ("no", "bf16"):
        validate(dataclasses.replace(_CONFIG, mixed_precision=mixed_precision), "flax")


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
    "changes", [{"from_pt": True}, {"controlnet_from_pt": True}, {"set_grads_to_none": True}, {"local_rank": 0}]
)
def test_a_flag_honoured_otherwise_is_noticed_in_one_line(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(_CONFIG, **changes)
    validate(config, "flax")
    (notice,) = notices(config, "flax")
    assert notice.startswith(f"--{next(iter(changes))}: ")
    assert "\n" not in notice
    assert notices(config, "torch") == []


def test_the_defaults_need_no_notice() -> None:
    assert notices(_CONFIG, "flax") == []
