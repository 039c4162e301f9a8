"""`python -m shared.compare` from the command line: what it is asked, and one message for each mistake."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.compare.__main__ import main
from shared.compare.command import CompareFolders, TrainBoth, read_command
from shared.config.demo import demo_arguments
from tests.end_to_end.support.running import PROJECT
from tests.shared.compare.run_folders import make_run

_WITHOUT_MATPLOTLIB = """
import runpy, sys
for name in ("matplotlib", "jinja2", "torch", "jax"):
    sys.modules[name] = None  # importing it fails
runpy.run_module("shared.compare", run_name="__main__", alter_sys=True)
"""

Fail = Callable[..., str]


def run_command(*words: object, start: tuple[str, ...] = ("-m", "shared.compare")) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *start, *map(str, words)],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def fail() -> Fail:
    """Runs the command where matplotlib cannot be imported, and returns the one message that it ends with."""

    def run(*words: object) -> str:
        done = run_command(*words, start=("-c", _WITHOUT_MATPLOTLIB))
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert done.stderr.count("error: ") == 1
        return done.stderr

    return run


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return make_run(tmp_path / "finished")


def test_both_exit_codes_and_the_page(tmp_path: Path, finished: Path) -> None:
    same, other = make_run(tmp_path / "same"), make_run(tmp_path / "other", losses=[0.5, 0.25, 0.2])
    page = tmp_path / "deep" / "report" / "comparison.html"
    agreed = run_command(finished, same, "--output_dir", page.parent)
    assert (agreed.returncode, agreed.stderr) == (0, "")
    assert agreed.stdout.splitlines()[-1] == f"The whole comparison is in {page}"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    apart = run_command(finished, other)
    assert (apart.returncode, apart.stderr) == (1, "")
    assert (tmp_path / "comparison_finished_other.html").is_file()


def test_help() -> None:
    done = run_command("--help", start=("-c", _WITHOUT_MATPLOTLIB))
    assert done.returncode == 0
    assert "RUN_A RUN_B [--output_dir DIR]" in done.stdout


def test_a_folder_that_does_not_exist(fail: Fail, finished: Path, tmp_path: Path) -> None:
    for words in ((tmp_path / "nowhere", finished), (finished, tmp_path / "nowhere")):
        assert f"{tmp_path / 'nowhere'} is not a folder" in fail(*words)


def test_a_folder_that_is_no_run(fail: Fail, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} is not a run's folder" in fail(finished, tmp_path / "empty")


def test_a_run_that_is_not_finished(fail: Fail, finished: Path, tmp_path: Path) -> None:
    running = make_run(tmp_path / "running")
    (running / "report.json").unlink()
    message = fail(finished, running)
    assert f"The run in {running} is not finished" in message
    assert "--resume_from_checkpoint latest" in message


def test_a_run_that_goes_on_after_its_report(fail: Fail, finished: Path, tmp_path: Path) -> None:
    longer = make_run(tmp_path / "longer", losses=[0.5] * 5, report={"steps": 3})
    message = fail(finished, longer)
    assert "its report is of step 3, but its metrics are of step 5" in message


def test_a_run_without_its_controlnet(fail: Fail, finished: Path, tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare")
    (bare / "diffusion_pytorch_model.safetensors").unlink()
    assert f"There is no ControlNet in {bare}" in fail(finished, bare)


@pytest.mark.parametrize("name", ["report.json", "metrics.jsonl"])
def test_a_damaged_file(fail: Fail, finished: Path, tmp_path: Path, name: str) -> None:
    damaged = make_run(tmp_path / "damaged")
    (damaged / name).write_text('{"steps": \n')
    assert f"{damaged} are damaged" in fail(finished, damaged)


def test_a_report_of_another_version(fail: Fail, finished: Path, tmp_path: Path) -> None:
    old = make_run(tmp_path / "old")
    report = json.loads((old / "report.json").read_text())
    del report["global_batch_size"]
    (old / "report.json").write_text(json.dumps(report))
    assert "lacks global_batch_size" in fail(finished, old)


@pytest.mark.parametrize(
    ("settings", "report", "named"),
    [
        ({"seed": 1}, {}, "--seed: 0 and 1"),
        ({"generated_circles": 9}, {}, "--generated_circles: 8 and 9"),
        ({"resolution": 64}, {}, "--resolution: 512 and 64"),
        ({"snr_gamma": 5.0}, {}, "--snr_gamma: None and 5.0"),
        ({"pretrained_model_name_or_path": "/models/other"}, {}, "'/models/one' and '/models/other'"),
        ({}, {"global_batch_size": 4}, "images per step: 2 and 4"),
    ],
)
def test_runs_that_a_comparison_would_mean_nothing_for(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    report: dict[str, Any],
    named: str,
) -> None:
    base = {"pretrained_model_name_or_path": "/models/one"}
    a = make_run(tmp_path / "a", **base)
    b = make_run(tmp_path / "b", report=report, **(base | settings))
    assert main([str(a), str(b)]) == 2
    message = capsys.readouterr().err
    assert "cannot be compared step by step, because these differ" in message
    assert message.count("\n  ") == 1, "nothing else differs"
    assert named in message


def test_everything_that_differs_is_named(fail: Fail, tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", losses=[0.5] * 4, seed=1, resolution=64)
    message = fail(a, b)
    for name in ("--seed", "--resolution", "optimizer steps: 3 and 4"):
        assert name in message


def test_no_step_in_common(fail: Fail, finished: Path, tmp_path: Path) -> None:
    sparse = make_run(tmp_path / "sparse", logging_steps=3)
    lines = (sparse / "metrics.jsonl").read_text().splitlines()
    (sparse / "metrics.jsonl").write_text(lines[-1] + "\n")
    message = fail(finished, sparse)
    assert "no logged step in common" in message
    assert "--logging_steps 1 and 3" in message


@pytest.mark.parametrize(
    ("a", "b", "comparable"),
    [
        ("/here/sd15", "/there/sd15", True),
        ("runwayml/sd15", "/there/sd15", True),
        ("runwayml/sd15", "someone/sd15", False),
        ("/here/sd15", None, False),
    ],
)
def test_the_same_model_may_lie_elsewhere(tmp_path: Path, a: str, b: str | None, comparable: bool) -> None:
    runs = [
        make_run(tmp_path / name, pretrained_model_name_or_path=location) for name, location in (("a", a), ("b", b))
    ]
    assert main(list(map(str, runs))) == (0 if comparable else 2)


def test_the_same_shards_may_lie_elsewhere(tmp_path: Path) -> None:
    def run(name: str, *shards: str) -> str:
        return str(make_run(tmp_path / name, generated_circles=None, train_shards=shards))

    a = run("a", "/data/{0..7}.tar", "/data/8.tar")
    assert main([a, run("b", "gs://bucket/{0..7}.tar", "gs://bucket/8.tar")]) == 0
    assert main([a, run("c", "gs://bucket/{0..7}.tar")]) == 2
    assert main([a, run("d", "gs://bucket/{0..7}.tar", "gs://bucket/9.tar")]) == 2


def test_a_page_that_cannot_be_written(fail: Fail, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = fail(finished, finished, "--output_dir", tmp_path / "file" / "deeper")
    assert "cannot be made: Not a directory" in message


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "usage:"),
        (("runs/a",), "1 run folders are given (runs/a); a comparison takes two"),
        (("runs/a", "runs/b", "runs/c"), "3 run folders are given"),
        (("runs/a", "runs/b", "--seed", "1"), "Training flags belong to the usage without run folders"),
        (("runs/a", "runs/b", "--output_dir", "x", "y"), "--output_dir with one folder"),
        (("--output_dir", "runs", "--train_batchsize", "3"), "did you mean --train_batch_size?"),
        (
            (
                "--output_dir",
                "runs",
                "--generated_circles",
                "8",
                "--pretrained_model_name_or_path",
                "m",
                "--push_to_hub",
            ),
            "--push_to_hub would upload both",
        ),
    ],
)
def test_words_that_are_neither_usage(fail: Fail, words: tuple[str, ...], named: str) -> None:
    assert named in fail(*words)


def test_only_an_output_dir_trains_the_demo(tmp_path: Path) -> None:
    for words in (["--output_dir", str(tmp_path)], [f"--output_dir={tmp_path}"]):
        assert read_command(words) == TrainBoth((*demo_arguments(), *words), tmp_path)


def test_training_flags_are_passed_on_as_they_are() -> None:
    words = ["--pretrained_model_name_or_path", "m", "--generated_circles", "8", "--output_dir", "runs/{timestamp}"]
    command = read_command(words)
    assert isinstance(command, TrainBoth)
    assert command.flags == tuple(words)
    assert "{timestamp}" not in str(command.output_dir)


def test_where_the_page_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = Path("runs/a"), Path("elsewhere/b")
    beside = tmp_path / "runs" / "comparison_a_b.html"
    assert read_command(["runs/a", "elsewhere/b"]) == CompareFolders(a, b, beside)
    for words in (["--output_dir", "out"], ["--output_dir=out"]):
        command = read_command(["runs/a", "elsewhere/b", *words])
        assert command == CompareFolders(a, b, Path("out/comparison.html"))


def test_runs_are_only_read(tmp_path: Path, finished: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    main([str(finished), str(copy), "--output_dir", str(tmp_path / "out")])
    for run in (finished, copy):
        assert sorted(path.name for path in run.iterdir()) == [
            "config.yaml",
            "diffusion_pytorch_model.safetensors",
            "metrics.jsonl",
            "report.json",
        ]
