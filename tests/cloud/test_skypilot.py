"""cloud/skypilot.yaml, read by SkyPilot itself; what it would run is run, where nothing that it starts is real."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.cloud.commands import CLOUD, MOUNT, flax_config, goes_on, launched_config, shellcheck

SKYPILOT = Path(sys.prefix) / "skypilot" / "bin" / "python"
FIRST, SECOND = "10.0.0.1", "10.0.0.2"

# The program of `run`, told instead of run.
_TELLS_ITS_WORDS = """#!/bin/bash
printf '%s\\0' "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"
"""
# Tells what is done as root, and with what on standard input.
_SUDO = """#!/bin/bash
echo "$@" >>"$HOME/done"
[ "$1" != tee ] || cat >>"$HOME/done"
"""
_UV = '#!/bin/bash\necho uv "$@" >>"$HOME/done"\n'
_NOTHING = "#!/bin/bash\n"


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """See `in_skypilot.py`."""
    assert SKYPILOT.exists(), "SkyPilot has an environment of its own, which `make test` makes"
    home = tmp_path_factory.mktemp("home")
    told = subprocess.run(
        [SKYPILOT, Path(__file__).with_name("in_skypilot.py"), CLOUD / "skypilot.yaml"],
        env={"HOME": str(home), "PATH": os.environ["PATH"], "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout.splitlines()[-1])


def words_of(task: dict[str, Any], folder: Path, *, gpus: int, rank: int) -> tuple[str, list[str]]:
    """What the `run` of a task starts on one of its nodes: the environment's seconds for a shutdown, and the words."""
    _write_program(folder / "cloud" / "train.sh", _TELLS_ITS_WORDS)
    given = {
        "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus),
        "SKYPILOT_NUM_NODES": str(task["nodes"]),
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": f"{FIRST}\n{SECOND}",
    }
    told = subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=folder,
        env={"PATH": os.environ["PATH"]} | task["environment"] | given,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, *words = told.stdout.removesuffix("\0").split("\0")
    return seconds, words


def _write_program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)


def test_it_takes_spot_machines_of_googles_cloud(read: dict[str, Any]) -> None:
    for task, accelerators, nodes in ((read["tpu"], {"tpu-v6e-8": 1}, 1), (read["gpu"], {"H100": 8}, 2)):
        assert (task["cloud"], task["use_spot"]) == ("GCP", True)
        assert (task["accelerators"], task["nodes"]) == (accelerators, nodes)
        assert task["secrets"] == ["HF_TOKEN"]


def test_a_stopped_training_begins_anew_always_and_a_failed_one_three_times(read: dict[str, Any]) -> None:
    assert read["begins_anew"] == {
        "75": [True] * 5,
        "2": [True] * 3 + [False] * 2,
        "134": [True] * 3 + [False] * 2,
    }


def test_on_tpus_it_runs_train_flax(read: dict[str, Any], tmp_path: Path) -> None:
    _, words = words_of(read["tpu"], tmp_path, gpus=0, rank=0)
    config = flax_config(words)
    assert goes_on(config)
    assert config.output_dir == f"{MOUNT}/circles"
    assert config.ccache == "gs://my-bucket/compiled"


def test_on_gpus_it_runs_train_torch_on_every_node_with_the_same_flags(read: dict[str, Any], tmp_path: Path) -> None:
    seconds, words = words_of(read["gpu"], tmp_path, gpus=8, rank=1)
    launching, config = launched_config(words)
    assert int(seconds) >= 600
    assert (launching["num_machines"], launching["machine_rank"], launching["num_processes"]) == (2, 1, 16)
    assert (launching["main_process_ip"], launching["config_file"]) == (
        FIRST,
        "torch_trainer/accelerate_configs/multi_gpu.yaml",
    )
    assert goes_on(config)
    _, on_tpus = words_of(read["tpu"], tmp_path, gpus=0, rank=0)
    assert asdict(config) == asdict(flax_config(on_tpus)) | {"ccache": None}


@pytest.mark.parametrize("with_gpus", [False, True])
def test_setup_installs_the_backend_and_mounts_the_bucket(
    read: dict[str, Any], tmp_path: Path, with_gpus: bool
) -> None:
    programs = tmp_path / "programs"
    _write_program(programs / "sudo", _SUDO)
    _write_program(programs / "curl", _NOTHING)
    _write_program(tmp_path / ".local" / "bin" / "uv", _UV)
    if with_gpus:
        _write_program(programs / "nvidia-smi", _NOTHING)
    for name in ("cat", "grep", "id"):  # no others, for this machine may have GPUs itself
        (programs / name).symlink_to(str(shutil.which(name)))
    subprocess.run(
        ["/bin/bash", "-c", read["tpu"]["setup"]],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": str(programs)} | read["tpu"]["environment"],
        capture_output=True,
        text=True,
        check=True,
    )
    done = (tmp_path / "done").read_text()
    packages = "--torch-backend=auto -r requirements.txt" if with_gpus else "-r requirements_flax.txt jax[tpu]"
    assert f"uv pip install --python .venv/bin/python {packages}\n" in done
    (entry,) = [line for line in done.splitlines() if line.startswith("my-bucket ")]
    source, place, kind, options, *_ = entry.split()
    assert (source, place, kind) == ("my-bucket", MOUNT, "gcsfuse")
    assert {"metadata_cache_ttl_secs=0", "metadata_cache_negative_ttl_secs=0"} < set(options.split(","))
    assert done.endswith("systemctl start mnt-shared.mount\n")


def test_its_shell_is_sound(read: dict[str, Any]) -> None:
    shellcheck(read["tpu"]["setup"])
    shellcheck(read["tpu"]["run"])
