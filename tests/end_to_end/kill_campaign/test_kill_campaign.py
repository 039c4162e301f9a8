"""The short form of `python3 -m tests.end_to_end.kill_campaign`, and that what it looks for is found."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shared.config import TrainConfig
from shared.run.folder import WEIGHTS_FILE
from shared.tracking import open_trackers
from tests.end_to_end.kill_campaign.faults import Means, plans
from tests.end_to_end.kill_campaign.judging import differences, resumable_step
from tests.end_to_end.kill_campaign.kinds import KINDS
from tests.end_to_end.kill_campaign.moments import Moment
from tests.end_to_end.support.running import PROJECT

SEED = 1


def test_what_is_left_is_what_an_undisturbed_run_leaves(tmp_path: Path) -> None:
    results, options = tmp_path / "results", ("--kills", "--stops", "--disks", "--read_only", "--clocks")
    asked = dict(zip(Means, (4, 2, 1, 1, 1), strict=True))
    words = [word for option, count in zip(options, asked.values(), strict=True) for word in (option, count)]
    words += ["--seed", SEED, "--only", "Flax, mesh", "PyTorch", "--json", results, "--work", tmp_path]
    command = [sys.executable, "-m", "tests.end_to_end.kill_campaign", *map(str, words)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    met = Counter(json.loads(line)["means"] for line in results.read_text().splitlines())
    for means, count in asked.items():
        assert met[means] == (0 if f"Left out: {means}" in done.stderr else count)
    assert met["the end"] >= 2


def test_a_seed_deals_every_means_to_every_kind_and_moment() -> None:
    counts = {Means.KILL: 100, Means.STOP: 20}
    found = plans(SEED, counts, list(KINDS))
    assert found == plans(SEED, counts, list(KINDS)) != plans(SEED + 1, counts, list(KINDS))
    faults = [(plan.kind, fault.means, fault.moment) for plan in found for fault in plan.faults]
    assert Counter(means for _, means, _ in faults) == counts
    assert {(kind, moment) for kind, means, moment in faults if means == Means.KILL} == {
        (kind, moment) for kind in KINDS for moment in Moment
    }
    for plan in found:
        lateness = [{Moment.RESULT: 1, Moment.UPLOADING: 2}.get(fault.moment, 0) for fault in plan.faults]
        assert lateness == sorted(lateness), "what comes late in a run comes late in its plan"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """What a run leaves, as far as it is compared."""
    run = tmp_path / "whole"
    (run / "validation" / "step-4").mkdir(parents=True)
    (run / "validation" / "step-4" / "0.png").write_bytes(b"a picture")
    (run / "checkpoint-4").mkdir()
    tracker = open_trackers(replace(TrainConfig(), output_dir=str(run), report_to="tensorboard"), run)
    tracker.truncate_after(-1)
    for step in range(1, 5):
        tracker.log(
            {"loss": 1 / step, "images_per_second": 3.0} | ({"validation_loss": 0.5} if step == 4 else {}), step
        )
    tracker.close()
    save_file({"weight": np.arange(4, dtype=np.float32)}, run / WEIGHTS_FILE)
    for name in ("config.json", "README.md"):
        (run / name).write_text(name)
    return run


def _one_bit_of_a_weight(run: Path) -> None:
    weight = load_file(run / WEIGHTS_FILE)["weight"]
    weight.view(np.uint32)[2] ^= 1
    save_file({"weight": weight}, run / WEIGHTS_FILE)


def _a_figure(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace("0.25", "0.2500001"))


def _a_line_twice(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_text(file.read_text() + file.read_text().splitlines(keepends=True)[-1])


def _a_validation_in_a_line_of_its_own(run: Path) -> None:
    """As a start leaves that makes up for what a stopped one left out: that is no difference."""
    file = run / "metrics.jsonl"
    step = json.loads(file.read_text().splitlines()[-1])
    own = {name: step.pop(name) for name in ("validation_loss",)} | {"step": step["step"]}
    kept = file.read_text().splitlines()[:-1]
    file.write_text("".join(f"{line}\n" for line in [*kept, json.dumps(step), json.dumps(own)]))


def _a_validation_left_out(run: Path) -> None:
    _a_validation_in_a_line_of_its_own(run)
    file = run / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def _no_picture(run: Path) -> None:
    (run / "validation" / "step-4" / "0.png").unlink()


def _a_checkpoint_more(run: Path) -> None:
    (run / "checkpoint-2").mkdir()


def _half_a_file(run: Path) -> None:
    (run / f".{WEIGHTS_FILE}.0123abcd.tmp").touch()


def _a_picture(run: Path) -> None:
    (run / "validation" / "step-4" / "0.png").write_bytes(b"another")


def _steps_twice_in_tensorboard(run: Path) -> None:
    tracker = open_trackers(replace(TrainConfig(), output_dir=str(run), report_to="tensorboard"), run / "logs")
    tracker.log({"loss": 1 / 3}, 3)
    tracker.close()
    (run / "logs" / "metrics.jsonl").unlink()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: None, []),
        (_one_bit_of_a_weight, ["the ControlNet's weight", "at the Hub"]),
        (_a_figure, ["metrics.jsonl"]),
        (_a_line_twice, ["metrics.jsonl"]),
        (_a_validation_in_a_line_of_its_own, []),
        (_a_validation_left_out, ["metrics.jsonl"]),
        (_no_picture, ["the picture"]),
        (_a_checkpoint_more, ["checkpoints", "entries of the folder"]),
        (_half_a_file, ["entries of the folder"]),
        (_a_picture, ["the picture"]),
        (_steps_twice_in_tensorboard, ["TensorBoard shows steps twice", "TensorBoard ends"]),
    ],
)
def test_what_a_disturbed_run_left_otherwise_is_found(
    whole: Path, tmp_path: Path, change: Callable[[Path], None], told: list[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    change(run)
    uploaded = {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    found = list(differences(run, whole, uploaded))
    assert len(found) == len(told), found
    for difference, words in zip(found, told, strict=True):
        assert words in difference


def test_a_damaged_checkpoint_is_no_place_to_go_on_from(whole: Path) -> None:
    assert resumable_step(whole.parent / "nowhere") == 0
    (whole / "checkpoint-4" / "digests.json").write_text("{}")
    with pytest.raises(ValueError, match="check_run ends with 1"):
        resumable_step(whole)
