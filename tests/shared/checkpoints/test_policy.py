"""Which checkpoint a run resumes from, and what it is told when it may not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.checkpoints.choice import checkpoint_to_resume
from shared.checkpoints.policy import (
    check_resumable,
    checkpoint_record,
    checkpoint_step,
    checkpoints_in,
    is_checkpoint,
    rename_later_checkpoints,
)
from shared.config import TrainConfig
from shared.user_errors import UserError

CONFIG = TrainConfig(pretrained_model_name_or_path="some/model", train_data_dir="photos", seed=1)
MANIFEST = {
    "kind": "image_folder",
    "location": "/data/photos",
    "samples": 50,
    "fingerprint": "0f3a",
    "columns": ["image", "text"],
}
CHECKPOINT = Path("run/checkpoint-7")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)


def folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


def refusal(saved: dict[str, Any], current: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="cannot be resumed") as refused:
        check_resumable(CHECKPOINT, saved, current)
    return str(refused.value)


def record(manifest: dict[str, Any] = MANIFEST, size: int = 8, **changes: Any) -> dict[str, Any]:
    return checkpoint_record(replace(CONFIG, **changes), manifest, size)


def test_runs_of_when_a_sample_had_one_condition_go_on() -> None:
    """Their checkpoints hold a number where there may be several now."""
    old = record()
    assert old["configuration"]["conditioning_channels"] == 3
    check_resumable(CHECKPOINT, old, record(conditioning_channels=(3,)))
    assert "--conditioning_channels: 3 in the checkpoint, 1 now" in refusal(old, record(conditioning_channels=(1,)))
    several = record(conditioning_channels=(1, 3))
    check_resumable(CHECKPOINT, several, record(conditioning_channels=(1, 3)))
    assert "--conditioning_channels: [1, 3] in the checkpoint, [3, 1] now" in refusal(
        several, record(conditioning_channels=(3, 1))
    )


@given(st.integers(0, 10**12))
def test_names_carry_the_step(step: int) -> None:
    path = Path("/") / f"checkpoint-{step}"
    assert checkpoint_step(path) == step
    assert not is_checkpoint(path), "a path that is no folder is no checkpoint"


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-7.orbax-checkpoint-tmp",
        "checkpoint-7.orbax-checkpoint-tmp-1700000000000000",
        "checkpoint-7.tmp",
        "checkpoint-",
        "checkpoint--7",
        "checkpoint-7 ",
        "checkpoint_7",
        "my-checkpoint-7",
        "Checkpoint-7",
        "checkpoint-last",
        "checkpoint-7.abandoned",
    ],
)
def test_no_other_folder_is_a_checkpoint(tmp_path: Path, name: str) -> None:
    folders(tmp_path, name)
    assert not is_checkpoint(tmp_path / name)
    assert checkpoints_in(tmp_path) == []
    assert checkpoint_to_resume(tmp_path, "latest") is None


def test_checkpoints_are_listed_by_number_not_by_name(tmp_path: Path) -> None:
    folders(tmp_path, "checkpoint-1000", "checkpoint-20", "checkpoint-3", "validation")
    (tmp_path / "checkpoint-5").write_text("a file")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-1000"]
    assert checkpoint_to_resume(tmp_path, "latest") == tmp_path / "checkpoint-1000"


def test_a_run_folder_that_does_not_exist_yet_starts_afresh(tmp_path: Path) -> None:
    assert checkpoint_to_resume(tmp_path / "new", None) is None
    assert checkpoint_to_resume(tmp_path / "new", "latest") is None


def test_a_checkpoint_is_named_or_given_by_its_path(tmp_path: Path) -> None:
    folders(tmp_path, "run/checkpoint-3", "run/checkpoint-7", "other/checkpoint-5")
    run, other = tmp_path / "run", tmp_path / "other"
    assert checkpoint_to_resume(run, "checkpoint-3") == run / "checkpoint-3"
    assert checkpoint_to_resume(run, str(other / "checkpoint-5")) == other / "checkpoint-5"
    assert checkpoint_to_resume(run, f"{run}/checkpoint-3/") == run / "checkpoint-3"


def test_a_missing_checkpoint_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    folders(tmp_path, "checkpoint-3", "checkpoint-20")
    with pytest.raises(ValueError, match=r"checkpoint-4.*no such checkpoint.*checkpoint-3, checkpoint-20"):
        checkpoint_to_resume(tmp_path, "checkpoint-4")
    with pytest.raises(ValueError, match="there: none"):
        checkpoint_to_resume(tmp_path / "new", "checkpoint-4")


def test_a_fresh_run_does_not_mix_with_an_older_one(tmp_path: Path) -> None:
    folders(tmp_path, "checkpoint-3", "checkpoint-20")
    with pytest.raises(ValueError, match=r"checkpoint-3, checkpoint-20.*--resume_from_checkpoint latest"):
        checkpoint_to_resume(tmp_path, None)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_a_run_always_resumes_from_its_own_record_read_back_from_json(manifest: dict[str, Any]) -> None:
    written = record(manifest)
    check_resumable(CHECKPOINT, json.loads(json.dumps(written)), written)
    check_resumable(CHECKPOINT, json.loads(json.dumps(written)), record(manifest))


def test_what_does_not_change_the_batches_may_change() -> None:
    changed = record(learning_rate=1.0, max_train_steps=9, output_dir="elsewhere", dataloader_num_workers=3)
    check_resumable(CHECKPOINT, record(), changed)


def test_every_difference_is_named_with_both_values() -> None:
    manifest = MANIFEST | {"samples": 49, "columns": ["image", "caption"]}
    message = refusal(record(), record(manifest, 16, seed=2, resolution=256))
    assert str(CHECKPOINT) in message
    lines = [line.strip() for line in message.splitlines() if line.startswith("  ")]
    assert lines == [
        "--resolution: 512 in the checkpoint, 256 now",
        "--seed: 1 in the checkpoint, 2 now",
        "data columns: ['image', 'text'] in the checkpoint, ['image', 'caption'] now",
        "data samples: 50 in the checkpoint, 49 now",
        "global batch size (--train_batch_size x devices x --gradient_accumulation_steps): 8 in the checkpoint, 16 now",
    ]
    assert "--output_dir" in message


@pytest.mark.parametrize("several", [False, True])
def test_local_data_with_the_same_fingerprint_may_have_moved(tmp_path: Path, several: bool) -> None:
    def located(folder: str) -> dict[str, Any]:
        location = [f"{folder}/a.tar", f"{folder}/b.tar"] if several else folder
        return record(MANIFEST | {"location": location})

    (tmp_path / "a.tar").touch()
    (tmp_path / "b.tar").touch()
    check_resumable(CHECKPOINT, located("/data/photos"), located(str(tmp_path)))
    check_resumable(CHECKPOINT, located("someone/photos"), located(str(tmp_path)))
    (tmp_path / "b.tar").unlink()
    if several:
        assert "data location" in refusal(located("/data/photos"), located(str(tmp_path)))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("fusing/fill50k", "someone/fill50k"),
        ("/data/photos", "someone/photos"),
        ("/data/photos", "/data/that/is/not/there"),
        (["a.tar"], ["https://host.example/a.tar"]),
    ],
)
def test_data_that_is_not_on_this_machine_may_not_move(before: Any, now: Any) -> None:
    """Two datasets of the Hub may share their captions, and so the fingerprint, and not their pictures."""
    message = refusal(record(MANIFEST | {"location": before}), record(MANIFEST | {"location": now}))
    assert f"data location: {before!r} in the checkpoint, {now!r} now" in message
    assert "fingerprint" not in message


def test_remote_data_in_its_place_may_be_resumed() -> None:
    there = MANIFEST | {"location": "fusing/fill50k"}
    check_resumable(CHECKPOINT, record(there), record(there))


@pytest.mark.parametrize("fingerprints", [(None, None), ("0f3a", None), (None, "0f3a"), ("0f3a", "77c1")])
def test_data_that_cannot_be_recognised_may_not_move(
    tmp_path: Path, fingerprints: tuple[str | None, str | None]
) -> None:
    before, now = fingerprints
    moved = MANIFEST | {"location": str(tmp_path), "fingerprint": now}
    message = refusal(record(MANIFEST | {"fingerprint": before}), record(moved))
    assert f"data location: '/data/photos' in the checkpoint, '{tmp_path}' now" in message
    assert ("fingerprint" in message) == (before != now)


def test_the_same_place_with_other_content_is_other_data() -> None:
    message = refusal(record(), record(MANIFEST | {"fingerprint": "77c1"}))
    assert "data fingerprint: '0f3a' in the checkpoint, '77c1' now" in message
    assert "location" not in message


@pytest.mark.parametrize("flag", ["use_ema", "only_mid_control", "sd_unlocked"])
def test_a_checkpoint_older_than_a_flag_is_of_a_run_without_it(flag: str) -> None:
    older = record()
    del older["configuration"][flag]
    check_resumable(Path("checkpoint-1"), older, record())
    with pytest.raises(ValueError, match=rf"--{flag}: False in the checkpoint, True now"):
        check_resumable(Path("checkpoint-1"), older, record(**{flag: True}))
    with pytest.raises(ValueError, match=rf"--{flag}: True in the checkpoint, False now"):
        check_resumable(Path("checkpoint-1"), record(**{flag: True}), record())


def test_a_record_keeps_no_secret() -> None:
    assert "hf_secret" not in json.dumps(record(hub_token="hf_secret"))


# --- going back ------------------------------------------------------------------------------------------------------


def test_going_back_sets_the_later_checkpoints_aside(tmp_path: Path) -> None:
    folders(tmp_path, "checkpoint-3", "checkpoint-20", "checkpoint-100", "checkpoint-9.orbax-checkpoint-tmp", "logs")
    (tmp_path / "checkpoint-100" / "state").write_text("of the first course")
    assert rename_later_checkpoints(tmp_path, 3) == [tmp_path / f"checkpoint-{step}.abandoned" for step in (20, 100)]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("checkpoint-3", "checkpoint-20.abandoned", "checkpoint-100.abandoned"),
        *("checkpoint-9.orbax-checkpoint-tmp", "logs"),
    }
    assert (tmp_path / "checkpoint-100.abandoned" / "state").read_text() == "of the first course"
    assert checkpoints_in(tmp_path) == [tmp_path / "checkpoint-3"]
    assert checkpoint_to_resume(tmp_path, "latest") == tmp_path / "checkpoint-3"
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        checkpoint_to_resume(tmp_path, "checkpoint-20.abandoned")


def test_what_was_set_aside_before_is_replaced(tmp_path: Path) -> None:
    for course in ("first", "second"):
        folders(tmp_path, "checkpoint-20")
        (tmp_path / "checkpoint-20" / course).touch()
        rename_later_checkpoints(tmp_path, 3)
    assert [path.name for path in (tmp_path / "checkpoint-20.abandoned").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20.abandoned"]


def test_a_run_that_goes_on_from_its_end_sets_nothing_aside(tmp_path: Path) -> None:
    folders(tmp_path, "checkpoint-3", "checkpoint-20", "checkpoint-30.abandoned")
    assert rename_later_checkpoints(tmp_path, 20) == []
    assert rename_later_checkpoints(tmp_path / "new", 0) == []
    assert checkpoints_in(tmp_path) == [tmp_path / "checkpoint-3", tmp_path / "checkpoint-20"]


@given(steps=st.sets(st.integers(0, 300), max_size=5), step=st.integers(0, 300))
def test_no_checkpoint_after_the_step_is_left_and_none_before_it_is_touched(
    tmp_path_factory: pytest.TempPathFactory, steps: set[int], step: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    folders(folder, *(f"checkpoint-{there}" for there in steps))
    rename_later_checkpoints(folder, step)
    assert [checkpoint_step(path) for path in checkpoints_in(folder)] == sorted(at for at in steps if at <= step)
    assert len(list(folder.iterdir())) == len(steps)


# --- names and links that others made --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["checkpoint-0001", "checkpoint-١٢", "checkpoint-²", "checkpoint-+1", "checkpoint-1_0", f"checkpoint-{'9' * 19}"],
)
def test_only_the_one_way_to_write_a_number_is_a_step(tmp_path: Path, name: str) -> None:
    folders(tmp_path, name, "checkpoint-0")
    assert checkpoints_in(tmp_path) == [tmp_path / "checkpoint-0"]
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        checkpoint_to_resume(tmp_path, name)


@pytest.mark.parametrize(
    "given",
    [
        "checkpoint-1\0",
        "\0",
        "x" * 5000,
        "checkpoint-1\n\x1b[2Jerror: FORGED",
        "\ud83d",
        "../../etc",
        "/dev/zero",
        "",
        ".",
    ],
)
def test_no_name_ends_in_a_traceback(tmp_path: Path, given: str) -> None:
    (tmp_path / "checkpoint-5").write_text("a file")
    with pytest.raises(ValueError, match="there is no such checkpoint") as refused:
        checkpoint_to_resume(tmp_path, given)
    assert isinstance(refused.value, UserError)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1500


def test_a_link_that_leads_out_is_refused_and_one_that_stays_is_a_checkpoint(tmp_path: Path) -> None:
    folders(tmp_path, "run/checkpoint-3", "elsewhere/checkpoint-9")
    run = tmp_path / "run"
    (run / "checkpoint-4").symlink_to("checkpoint-3")
    assert checkpoint_to_resume(run, "latest") == run / "checkpoint-4"
    (run / "checkpoint-9").symlink_to(tmp_path / "elsewhere" / "checkpoint-9")
    (run / "checkpoint-10").symlink_to("nowhere")
    (run / "checkpoint-11").symlink_to("checkpoint-11")
    assert checkpoints_in(run) == [run / "checkpoint-3", run / "checkpoint-4"]
    for name in ("latest", "checkpoint-9", str(run / "checkpoint-9")):
        with pytest.raises(ValueError, match=r"checkpoint-9 is a link that leads out of its folder"):
            checkpoint_to_resume(run, name)
    assert checkpoint_to_resume(run, str(tmp_path / "elsewhere" / "checkpoint-9")) is not None


def test_what_is_set_aside_goes_through_no_link(tmp_path: Path) -> None:
    folders(tmp_path, "run/checkpoint-3", "run/checkpoint-5", "run/checkpoint-7", "outside")
    run, precious = tmp_path / "run", tmp_path / "outside" / "precious"
    precious.touch()
    (run / "checkpoint-5.abandoned").symlink_to(precious.parent)
    (run / "checkpoint-7.abandoned").symlink_to("nothing")
    rename_later_checkpoints(run, 3)
    assert precious.exists()
    assert not any(path.is_symlink() for path in run.iterdir())


def test_a_record_of_hostile_settings_is_told_within_bounds() -> None:
    saved = record()
    saved["configuration"] |= {f"--\x1b[2J{number}\nerror: FORGED": "x" * 10_000 for number in range(1000)}
    message = refusal(saved, record())
    assert all(line.isprintable() and not line.startswith("error") for line in message.split("\n"))
    assert len(message) < 10_000
    assert "and 980 more" in message


@pytest.mark.parametrize(("before", "now"), [(True, 1), (1, True), (False, 0), ("1", 1), (None, "None"), ([1], 1)])
def test_values_of_other_types_are_others(before: Any, now: Any) -> None:
    saved, current = record(), record()
    saved["configuration"]["seed"], current["configuration"]["seed"] = before, now
    assert f"--seed: {before!r} in the checkpoint, {now!r} now" in refusal(saved, current)


# --- the learning rate -----------------------------------------------------------------------------------------------


def of_steps(total: int, **changes: Any) -> dict[str, Any]:
    config = replace(CONFIG, **{"lr_scheduler": "linear", "learning_rate": 1e-4, "lr_warmup_steps": 0} | changes)
    return checkpoint_record(config, MANIFEST, 8, total)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        pytest.param(
            of_steps(10),
            of_steps(20),
            "--max_train_steps was 10 and is 20. After step 7 it would have been 3e-05 and is 6.5e-05.",
            id="longer",
        ),
        pytest.param(
            of_steps(10, lr_scheduler="constant"),
            of_steps(10, lr_scheduler="constant", learning_rate=3e-4),
            "--learning_rate was 0.0001 and is 0.0003. After step 7 it would have been 0.0001 and is 0.0003",
            id="another rate",
        ),
        pytest.param(
            of_steps(10, lr_scheduler="constant"),
            of_steps(10, lr_scheduler="constant", scale_lr=True),
            "--scale_lr was False and is True. After step 7 it would have been 0.0001 and is 0.0008",
            id="scaled",
        ),
        pytest.param(
            of_steps(10, lr_scheduler="constant_with_warmup", lr_warmup_steps=500),
            of_steps(10, lr_scheduler="constant_with_warmup", lr_warmup_steps=8),
            "--lr_warmup_steps was 500 and is 8",
            id="another warm-up",
        ),
        pytest.param(
            of_steps(10, lr_scheduler="polynomial", lr_warmup_steps=0),
            of_steps(10, lr_scheduler="cosine", lr_warmup_steps=0),
            "--lr_scheduler was polynomial and is cosine",
            id="another schedule",
        ),
    ],
)
def test_another_course_of_the_learning_rate_is_told_once(
    caplog: pytest.LogCaptureFixture, before: dict[str, Any], now: dict[str, Any], told: str
) -> None:
    check_resumable(CHECKPOINT, before, now)
    (said,) = caplog.messages
    assert said.startswith("run/checkpoint-7: from here on the learning rate follows another curve")
    assert told in said


@pytest.mark.parametrize(
    ("before", "now"),
    [
        pytest.param(of_steps(10), of_steps(10), id="the same"),
        pytest.param(record(), of_steps(10), id="older than this part of the record"),
        pytest.param(
            of_steps(10, lr_scheduler="constant"), of_steps(20, lr_scheduler="constant"), id="no end to reach"
        ),
        pytest.param(of_steps(10), of_steps(10, lr_power=3.0), id="of another schedule"),
        pytest.param(
            of_steps(10, lr_scheduler="constant_with_warmup", lr_warmup_steps=3),
            of_steps(10, lr_scheduler="constant_with_warmup", lr_warmup_steps=5),
            id="a warm-up that is over",
        ),
        pytest.param(
            of_steps(10, learning_rate=8e-4), of_steps(10, learning_rate=1e-4, scale_lr=True), id="the same in the end"
        ),
        pytest.param(of_steps(20), of_steps(7), id="no step is left"),
    ],
)
def test_a_course_that_stays_the_same_is_not_worth_a_word(
    caplog: pytest.LogCaptureFixture, before: dict[str, Any], now: dict[str, Any]
) -> None:
    check_resumable(CHECKPOINT, before, now)
    assert caplog.messages == []
