"""The ready accelerate configurations, read as `accelerate launch` and the processes that it starts read them."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.dataclasses import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from diffusers import ControlNetModel
from torch.distributed.fsdp import StateDictType
from torch.distributed.run import determine_local_world_size

from shared.config import TrainConfig
from torch_trainer.distributed.accelerator import make_accelerator

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "torch_trainer" / "accelerate_configs"
NAMES = sorted(path.name for path in CONFIGS.glob("*"))

SD15 = {"cross_attention_dim": 768}
SD21 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def launch_arguments(name: str, *launcher_flags: str) -> argparse.Namespace:
    """What `accelerate launch --config_file NAME train_torch.py` makes of its command line and the file."""
    # Port 0 is any free one.
    words = ["--config_file", str(CONFIGS / name), "--main_process_port", "0", *launcher_flags]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "train_torch.py"]))
    return arguments


def launched_environment(
    name: str, monkeypatch: pytest.MonkeyPatch, *launcher_flags: str
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The launcher's arguments for torchrun, and the environment of its processes, which becomes this process's."""
    arguments = launch_arguments(name, *launcher_flags)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = "zero_stage,offload_optimizer_device,mixed_precision"
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    return arguments, environment


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_key(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / name))  # refuses unknown keys of the top level

    assert isinstance(config, ClusterConfig)
    parser_knows = set(vars(launch_command_parser().parse_args(["script.py"])))
    nested = [*config.deepspeed_config, *config.fsdp_config]
    assert set(nested) <= parser_knows


def test_the_files_are_these() -> None:
    assert NAMES == ["deepspeed_zero2_cpu_offload.yaml", "fsdp.yaml", "multi_cpu.yaml", "multi_gpu.yaml"]


@pytest.mark.parametrize("name", NAMES)
def test_the_comment_says_how_to_launch_this_very_file(name: str) -> None:
    comment = [line for line in (CONFIGS / name).read_text(encoding="utf-8").splitlines() if line.startswith("#")]

    assert f"accelerate launch --config_file torch_trainer/accelerate_configs/{name} train_torch.py" in "\n".join(
        comment
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_flags_of_the_training_are_left_to_its_command_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, environment = launched_environment(name, monkeypatch)

    # It would win over --gradient_accumulation_steps.
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in environment
    assert "ACCELERATE_GRADIENT_CLIPPING" not in environment
    # Nothing compiles or trains in 8 bits behind the user's back.
    assert environment.get("ACCELERATE_DYNAMO_BACKEND", "NO") == "NO"
    expected_precision = "fp16" if name.startswith("deepspeed") else "no"
    assert environment["ACCELERATE_MIXED_PRECISION"] == expected_precision


@pytest.mark.parametrize("name", ["multi_gpu.yaml", "fsdp.yaml"])
def test_all_gpus_of_the_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = launched_environment(name, monkeypatch)[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)

    assert determine_local_world_size(arguments.nproc_per_node) == 3


@pytest.mark.parametrize("name", NAMES)
def test_the_launcher_can_be_told_another_number_of_processes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = launched_environment(name, monkeypatch, "--num_processes", "5")[0]

    assert determine_local_world_size(arguments.nproc_per_node) == 5


@pytest.mark.parametrize("name", ["multi_gpu.yaml", "multi_cpu.yaml"])
def test_data_parallel_runs_use_the_launcher_of_several_processes(name: str) -> None:
    arguments = launch_arguments(name)

    assert arguments.multi_gpu
    assert [name for name in ("use_fsdp", "use_deepspeed", "cpu", "tpu") if getattr(arguments, name)] == []


def test_fsdp_is_version_2_fully_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, environment = launched_environment("fsdp.yaml", monkeypatch)
    plugin = FullyShardedDataParallelPlugin()  # warns, which fails here, of settings that version 2 ignores

    assert arguments.use_fsdp
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert not plugin.activation_checkpointing  # that is --gradient_checkpointing
    assert environment["FSDP_OFFLOAD_PARAMS"] == "false"
    # transformers reads it: true leaves the frozen text encoder empty in all processes but the first.
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert not plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize(
    ("architecture", "least_sharded"), [(SD15, 0.87), (SD21, 0.87), (SDXL, 0.97)], ids=["sd15", "sd21", "sdxl"]
)
def test_fsdp_shards_controlnets_in_small_units(
    architecture: dict[str, object], least_sharded: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched_environment("fsdp.yaml", monkeypatch)
    with torch.device("meta"):
        controlnet = ControlNetModel(**architecture)
    is_unit = fsdp2_prepare_auto_wrap_policy(FullyShardedDataParallelPlugin(), controlnet)
    assert is_unit is not None
    units = [module for module in controlnet.modules() if is_unit(module)]
    sizes = [sum(param.numel() for param in unit.parameters()) for unit in units]

    assert len({id(param) for unit in units for param in unit.parameters()}) == sum(
        len(list(unit.parameters())) for unit in units
    )  # no unit inside another
    assert max(sizes) <= 35e6
    assert sum(sizes) >= least_sharded * sum(param.numel() for param in controlnet.parameters())


def test_deepspeed_is_stage_2_with_the_optimizer_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, environment = launched_environment("deepspeed_zero2_cpu_offload.yaml", monkeypatch)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(environment["ACCELERATE_MIXED_PRECISION"])
    settings = plugin.deepspeed_config

    assert arguments.use_deepspeed
    assert arguments.nproc_per_node == "1"
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert settings["zero_optimization"]["offload_param"]["device"] == "none"
    assert settings["fp16"]["enabled"] is True
    assert settings["bf16"]["enabled"] is False
    # accelerate replaces torch's AdamW by DeepSpeed's for the CPU unless this says no.
    assert settings.get("zero_force_ds_cpu_optimizer", True)
    # accelerate and the trainer fill these in from the flags.
    for key in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert settings[key] == "auto"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_deepspeed_takes_another_precision_from_the_command_line(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched_environment("deepspeed_zero2_cpu_offload.yaml", monkeypatch)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(precision)  # as Accelerator does with its argument, which --mixed_precision is

    assert plugin.deepspeed_config["fp16"]["enabled"] is False
    assert plugin.deepspeed_config["bf16"]["enabled"] is (precision == "bf16")


@pytest.mark.parametrize("flag", ["use_ema", "only_mid_control", "sd_unlocked"])
@pytest.mark.parametrize("name", ["deepspeed_zero2_cpu_offload.yaml", "fsdp.yaml"])
def test_what_needs_whole_weights_is_refused_where_they_are_divided(
    name: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched_environment(name, monkeypatch)
    with pytest.raises(ValueError, match=rf"--{flag} does not go with (DEEPSPEED|FSDP).*multi_gpu.yaml"):
        make_accelerator(TrainConfig(**{flag: True}))


def test_two_processes_on_the_cpu_find_each_other(tmp_path: Path) -> None:
    script = tmp_path / "who_is_there.py"
    script.write_text(
        "import json, sys, pathlib, torch\n"
        "from accelerate import Accelerator\n"
        "accelerator = Accelerator()\n"
        "rank = accelerator.process_index\n"
        "total = accelerator.reduce(torch.tensor(rank + 1.0), reduction='sum').item()\n"
        "facts = [accelerator.distributed_type.value, accelerator.num_processes, accelerator.device.type, total]\n"
        "pathlib.Path(sys.argv[1], f'{rank}.json').write_text(json.dumps(facts))\n"
        "accelerator.end_training()\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "multi_cpu.yaml")]
    completed = subprocess.run(
        [*command, "--main_process_port", "0", str(script), str(tmp_path)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert completed.returncode == 0, completed.stderr
    facts = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.json")}
    expected = [DistributedType.MULTI_CPU.value, 2, "cpu", 3.0]
    assert facts == {"0.json": expected, "1.json": expected}
