"""`python3 -m shared.check_run`: what it says of every kind of checkpoint, and the exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared import check_run
from shared.check_run import main
from shared.checkpoints.choice import checkpoint_to_resume
from shared.checkpoints.completing import tidy
from shared.checkpoints.digests import DIGESTS_FILE, Verdict, _sha256_of, write_digests
from shared.checkpoints.retention import mark_timed
from shared.run.folder import WEIGHTS_FILE, write_report
from shared.user_errors import UserError

PROJECT = Path(__file__).resolve().parents[2]


def checkpoint(run: Path, name: str, *files: str) -> Path:
    for file in files or ("training_state.json", "optimizer.safetensors"):
        (run / name / file).parent.mkdir(parents=True, exist_ok=True)
        (run / name / file).write_bytes(bytes(10**6))
    write_digests(run / name)
    return run / name


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two whole checkpoints, one of each backend, and a result."""
    run = tmp_path / "run"
    checkpoint(run, "checkpoint-2")
    checkpoint(run, "checkpoint-10", "state/manifest.ocdbt", "record/metadata")
    (run / WEIGHTS_FILE).touch()
    write_report(run, {"steps": 12})
    return run


def said(capsys: pytest.CaptureFixture[str], *runs: Path) -> tuple[int, list[str]]:
    exit_code = main([*map(str, runs)])
    return exit_code, [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def damage(checkpoint: Path, file: str = "optimizer.safetensors") -> None:
    with (checkpoint / file).open("r+b") as stream:
        stream.write(b"\1")


def test_a_whole_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, lines = said(capsys, run)
    assert exit_code == 0
    assert lines == [
        str(run),
        "checkpoint-2 step 2 torch 2.0 MB whole",
        "checkpoint-10 step 10 flax 2.0 MB whole",
        "result: a finished run of 12 steps",
        "--resume_from_checkpoint latest goes on from checkpoint-10, after step 10",
    ]


def test_one_of_a_number_of_seconds_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark_timed(run / "checkpoint-10")
    write_digests(run / "checkpoint-10")
    _, lines = said(capsys, run)
    told = "(of --checkpointing_seconds: a run deletes it when a newer one is complete)"
    assert lines[1:3] == ["checkpoint-2 step 2 torch 2.0 MB whole", f"checkpoint-10 step 10 flax 2.0 MB whole {told}"]


def test_nothing_is_changed(run: Path) -> None:
    checkpoint(run, "checkpoint-4.replaced")
    checkpoint(run, "checkpoint-6.unfinished")
    before = {path: path.lstat().st_mtime_ns for path in run.rglob("*")}
    main([str(run)])
    assert {path: path.lstat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_damaged_one_is_named_and_passed_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run / "checkpoint-10", "record/metadata")
    exit_code, lines = said(capsys, run)
    assert exit_code == 1
    assert lines[2].startswith("checkpoint-10 step 10 flax 2.0 MB damaged: record/metadata is not what was written")
    assert lines[-1] == "--resume_from_checkpoint latest goes on from checkpoint-2, after step 2"
    assert checkpoint_to_resume(run, "latest") == run / "checkpoint-2"


def test_all_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run / "checkpoint-2")
    damage(run / "checkpoint-10", "record/metadata")
    exit_code, lines = said(capsys, run)
    assert exit_code == 1
    assert lines[-1] == "--resume_from_checkpoint latest is refused: all checkpoints are damaged"
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint_to_resume(run, "latest")


def test_without_digests_it_cannot_be_checked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoint-10" / DIGESTS_FILE).unlink()
    exit_code, lines = said(capsys, run)
    assert exit_code == 0
    assert lines[2] == "checkpoint-10 step 10 flax 2.0 MB cannot be checked: it has no digests.json"
    assert lines[-1].endswith("goes on from checkpoint-10, after step 10")


@pytest.mark.parametrize(
    "name", ["checkpoint-12.unfinished", "checkpoint-12.orbax-checkpoint-tmp", "checkpoint-12.deleted.unfinished"]
)
def test_an_incomplete_one_is_nothing_to_go_on_from(run: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    checkpoint(run, name)
    exit_code, lines = said(capsys, run)
    assert exit_code == 0
    assert f"{name} step 12 torch" in lines[3]
    assert "incomplete" in lines[3]
    assert lines[-1].endswith("goes on from checkpoint-10, after step 10")


def test_one_that_lost_its_name_will_have_it_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(run, "checkpoint-12.replaced")
    checkpoint(run, "checkpoint-10.replaced")
    exit_code, lines = said(capsys, run)
    assert exit_code == 0
    assert [line for line in lines if "the next one calls it checkpoint-12 again" in line]
    assert [line for line in lines if "incomplete: another one of this step has taken its place" in line]
    assert lines[-1].endswith("goes on from checkpoint-12, after step 12")
    tidy(run)
    assert checkpoint_to_resume(run, "latest") == run / "checkpoint-12"


def test_one_that_was_set_aside_is_said_to_be(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(run, "checkpoint-20.abandoned")
    assert "set aside" in said(capsys, run)[1][3]


def test_a_link_that_leads_out_is_refused_as_a_run_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(run.parent, "elsewhere")
    (run / "checkpoint-20").symlink_to(run.parent / "elsewhere")
    exit_code, lines = said(capsys, run)
    assert exit_code == 1
    assert "checkpoint-20 is a link that leads out of its folder" in lines[-1]


def test_a_folder_without_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, tmp_path) == (
        0,
        [str(tmp_path), "no checkpoints", "result: none yet", "--resume_from_checkpoint latest starts afresh"],
    )


@pytest.mark.parametrize(
    ("files", "expected", "exit_code"),
    [
        ({WEIGHTS_FILE: ""}, f"{WEIGHTS_FILE} without the report of a finished run", 0),
        ({"report.json": '{"steps": 3}'}, f"a finished run of 3 steps; {WEIGHTS_FILE} is not there", 0),
        ({"report.json": '{"steps": 3, "not_written": ["the ControlNet"]}'}, "none yet", 0),
        ({"report.json": '{"steps": '}, "is not JSON", 1),
    ],
)
def test_what_there_is_of_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], expected: str, exit_code: int
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    found, lines = said(capsys, tmp_path)
    assert found == exit_code
    assert expected in lines[2]


def test_several_runs_and_the_worst_of_them(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = checkpoint(tmp_path / "other", "checkpoint-1")
    damage(other)
    exit_code, lines = said(capsys, tmp_path / "other", run)
    assert exit_code == 1
    assert str(run) in lines


@pytest.mark.parametrize("wrong", ["nowhere", "run/report.json", "run/checkpoint-2"])
def test_a_wrong_path_is_told_before_anything_is_read(
    run: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    assert main([str(run), str(run.parent / wrong)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: {run.parent / wrong} is ")


def test_names_of_others_do_nothing_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint-1\x1b[2J\nresult: FORGED.unfinished").mkdir()
    os.mkfifo(tmp_path / "checkpoint-2.unfinished")
    assert main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert len(output.splitlines()) == 5


def test_what_a_run_deletes_meanwhile_is_not_damaged(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = check_run.examine

    def slowly(checkpoint: Path) -> Verdict:
        if checkpoint.name == "checkpoint-2":
            shutil.rmtree(checkpoint)
        return really(checkpoint)

    monkeypatch.setattr(check_run, "examine", slowly)
    exit_code, lines = said(capsys, run)
    assert exit_code == 0
    assert "checkpoint-2" not in " ".join(lines)


def test_ctrl_c_ends_it_quietly(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check_run, "examine", interrupted)
    assert main([str(run)]) == 130
    assert capsys.readouterr().err == ""


def test_as_a_command_it_needs_neither_backend(run: Path) -> None:
    code = """
import runpy, sys
for name in ("torch", "diffusers", "jax", "flax", "orbax"):
    sys.modules[name] = None
sys.argv = ["check_run", sys.argv[1]]
runpy.run_module("shared.check_run", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code, str(run)], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "checkpoint-10, after step 10" in done.stdout


def test_ctrl_c_in_the_middle_of_a_large_checkpoint(run: Path) -> None:
    """As it comes: while a file is read."""
    of_nothing, size = run / "checkpoint-2" / "optimizer.safetensors", 20 * 10**9  # seconds to read, and no room
    os.truncate(of_nothing, size)
    digests = json.loads((run / "checkpoint-2" / DIGESTS_FILE).read_text())
    digests["files"][of_nothing.name]["bytes"] = size
    digests["sha256"] = _sha256_of(digests["files"])
    (run / "checkpoint-2" / DIGESTS_FILE).write_text(json.dumps(digests))
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "shared.check_run", str(run)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"{run}\n"
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=30)
    assert (process.returncode, output, error) == (130, "", "")
