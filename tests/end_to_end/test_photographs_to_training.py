"""Real photographs, which scikit-image ships, go the way that docs/preparing_data.md tells, by its own commands."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import skimage

from benchmarks import encoded_data_wait
from tests.docs.commands import commands
from tests.docs.pages import ROOT, page
from tests.end_to_end.support.running import finish, metrics, start_train_flax
from tests.end_to_end.support.tiny_runs import SIZE

HEADING = "## From photographs to a training"
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "rocket.jpg",
)


def test_the_commands_of_the_page_train_a_controlnet(
    base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photographs(tmp_path / "PHOTOS")
    annotate, check, cache, train = (words(command, base_model, tmp_path) for command in commands(block()))
    run_to_its_end(annotate)
    shards = sorted(path.name for path in (tmp_path / "SHARDS").iterdir())
    assert "000000.tar" in shards
    run_to_its_end(check)  # which fails where it finds something
    run_to_its_end(cache)
    assert json.loads((tmp_path / "CACHE" / "cache.json").read_text())["samples"] == len(PHOTOGRAPHS)
    assert train[0] == "train_flax.py"
    finish(start_train_flax([*train[1:], "--max_train_steps", "2", "--train_batch_size", "2", "--report_to", "none"]))
    assert [entry["step"] for entry in metrics(tmp_path / "RUN")] == [1, 2]
    assert (tmp_path / "RUN" / "diffusion_pytorch_model.safetensors").is_file()
    given = f"--cached_data {tmp_path}/CACHE --resolution {SIZE} --pretrained_model_name_or_path {base_model}"
    encoded_data_wait.main([*given.split(), "--step_ms", "1", "--steps", "2", "--rounds", "1"])
    assert re.search(r"\| 1 ms \| 0 \| [\d.]+ ms \| [\d.]+% \|\n\| 1 ms \| 1 \| [\d.]+ ms \|", capsys.readouterr().out)


def write_photographs(folder: Path) -> None:
    folder.mkdir()
    for name in PHOTOGRAPHS:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder)
    lines = (json.dumps({"file_name": name, "text": f"a photograph: {name}"}) for name in PHOTOGRAPHS)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def block() -> str:
    """The first block of shell after the heading."""
    text = page(ROOT / "docs" / "preparing_data.md").text
    return text.partition(HEADING)[2].partition("```sh\n")[2].partition("```")[0]


def words(command: list[str], base_model: Path, folder: Path) -> list[str]:
    """The page's command without python3, for a tiny model and tiny pictures, in a folder."""
    line = shlex.join(command[1:]).replace("BASE_MODEL", str(base_model))
    for name in ("PHOTOS", "SHARDS", "CACHE", "RUN"):
        line = line.replace(name, str(folder / name))
    return shlex.split(line.replace("--resolution 512", f"--resolution {SIZE}").replace("bf16", "no"))


def run_to_its_end(arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
