"""Publishing on the Hub, against a small Hub of our own on 127.0.0.1; and what happens without one."""

import shlex
from pathlib import Path

import pytest

from shared.config import TrainConfig
from shared.run import hub_retries
from shared.run.folder import REPORT_FILE, write_report
from shared.run.hub import prepare_repository, push, upload_result
from shared.run.model_card import write_model_card
from tests.shared.run.cards import content
from tests.shared.run.fake_hub import READER, WRITER, FakeHub, connect_to, log_out

UNKNOWN = "hf_unknown"
CONFIG = TrainConfig(push_to_hub=True, hub_token=WRITER, pretrained_model_name_or_path="some/model")


def with_token(token: str | None, **changes: str) -> TrainConfig:
    return TrainConfig(**{**vars(CONFIG), "hub_token": token, **changes})


def refusal(config: TrainConfig, output_dir: Path) -> str:
    """The message, which never quotes the token and always says what to do."""
    with pytest.raises(ValueError, match="--push_to_hub") as refused:
        prepare_repository(config, output_dir)
    message = str(refused.value)
    assert "\n" not in message
    assert "hf auth login" in message or "https://huggingface.co/settings/tokens" in message
    if config.hub_token:
        assert config.hub_token.strip() not in message
    return message


# --- before the work -------------------------------------------------------------------------------------------------


def test_without_push_to_hub_nothing_is_asked_of_anyone(hub: FakeHub, tmp_path: Path) -> None:
    assert prepare_repository(TrainConfig(hub_token=WRITER), tmp_path) is None
    assert hub.requests == []


def test_the_repository_is_named_after_the_folder(hub: FakeHub, tmp_path: Path) -> None:
    assert prepare_repository(CONFIG, tmp_path / "circles") == "me/circles"
    assert hub.repositories == {"me/circles"}


def test_the_repository_has_the_name_that_is_given(hub: FakeHub, tmp_path: Path) -> None:
    assert prepare_repository(with_token(WRITER, hub_model_id="team/net"), tmp_path) == "team/net"
    assert hub.repositories == {"team/net"}


def test_a_repository_that_exists_is_used_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories.add("me/circles")
    assert prepare_repository(CONFIG, tmp_path / "circles") == "me/circles"


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(("token", "status"), [(READER, "403"), (UNKNOWN, "401")])
def test_a_token_that_may_not_write_is_found_out_before_the_work(
    hub: FakeHub, tmp_path: Path, token: str, status: str, exists: bool
) -> None:
    if exists:
        hub.repositories.add("me/circles")
    message = refusal(with_token(token, hub_model_id="me/circles"), tmp_path)
    assert "'me/circles'" in message
    assert status in message


def test_nobody_logged_in(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories.add("me/circles")
    assert "there is no login" in refusal(with_token(None, hub_model_id="me/circles"), tmp_path)
    assert hub.requests == []


def test_a_login_on_this_machine_is_enough(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert prepare_repository(with_token(None), tmp_path / "circles") == "me/circles"


@pytest.mark.parametrize("token", ["", "hf_pasted\n", "hf_pasted ", "hf pasted", "hf_pästed"])
def test_a_token_that_cannot_be_sent_is_refused_without_being_shown(hub: FakeHub, tmp_path: Path, token: str) -> None:
    refusal(with_token(token), tmp_path)
    assert hub.requests == []


def test_a_name_that_the_hub_does_not_allow(hub: FakeHub, tmp_path: Path) -> None:
    assert "'my run!'" in refusal(CONFIG, tmp_path / "my run!")


def test_a_hub_that_is_down(hub: FakeHub, tmp_path: Path) -> None:
    hub.broken = True
    assert "down for maintenance" in refusal(CONFIG, tmp_path / "circles")


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    connect_to(monkeypatch, "http://127.0.0.1:9", tmp_path)  # the discard port: nothing listens
    assert "ConnectError" in refusal(CONFIG, tmp_path / "circles")


def test_offline_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log_out(monkeypatch, tmp_path)
    assert "HF_HUB_OFFLINE" in refusal(CONFIG, tmp_path / "circles")


@pytest.mark.parametrize("fault", [503, 429, 500, 408, 0])
def test_a_hub_that_fails_for_a_moment_is_asked_again(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: int
) -> None:
    hub.faults = [fault] * 3
    assert prepare_repository(CONFIG, tmp_path / "circles") == "me/circles"
    told = [record.message for record in caplog.records if record.message.startswith("The Hub: ")]
    assert [message.partition("Tried ")[2][:1] for message in told] == ["1", "2", "3"]


def test_a_refusal_is_not_asked_for_again(hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refusal(with_token(READER), tmp_path / "circles")
    assert len([request for request in hub.requests if "create" in request]) == 1
    assert "Tried" not in caplog.text


def test_how_long_the_hub_wants_one_to_wait_is_heeded(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(hub_retries.time, "sleep", slept.append)
    hub.faults, hub.retry_after = [429, 429], 7
    prepare_repository(CONFIG, tmp_path / "circles")
    assert slept == [7.0, 7.0]


# --- after the work --------------------------------------------------------------------------------------------------

KEPT = {
    "README.md",
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "report.json",
    "contact_sheet.png",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "validation/step-4/0.png",
    "validation/step-8/0.png",
}
LEFT_BEHIND = {
    "checkpoint-4/state/d/0af3",
    "checkpoint-4/config.json",
    "checkpoint-4/diffusion_pytorch_model.safetensors",
    "checkpoint-4/_CHECKPOINT_METADATA",
    "checkpoint-8.abandoned/state/d/0af3",
    "checkpoint-8.orbax-checkpoint-tmp/state/d/1b",
    "config.yaml",
    "logs/train_controlnet/events.out.tfevents.1",
    "metrics.jsonl",
    "my own picture.png",
    "notes of the user.txt",
    "report.json.tmp",
    "shards/0000.tar",
    "train.log",
    "wandb/run-1/files/config.yaml",
    "wandb/run-1/files/output.log",
}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "circles"
    for name in KEPT | LEFT_BEHIND:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    write_report(folder, {"steps": 4})
    write_model_card(folder, CONFIG, "me/circles", content(facts={"Steps": 4}))
    return folder


@pytest.mark.parametrize("logging_dir", ["logs", "./logs", "validation-logs"])
def test_only_what_others_are_to_see_is_uploaded(hub: FakeHub, run_folder: Path, logging_dir: str) -> None:
    config = with_token(WRITER, logging_dir=logging_dir)
    (run_folder / logging_dir).mkdir(exist_ok=True)
    (run_folder / logging_dir / "events.out.tfevents.2").write_text("a log")
    repository = prepare_repository(config, run_folder)
    assert repository == "me/circles"
    assert push(config, run_folder, repository) == f"{hub.address}/me/circles/commit/abc"
    assert set(hub.files) == KEPT
    for name, uploaded in hub.files.items():
        assert uploaded == (run_folder / name).read_bytes()
        assert WRITER.encode() not in uploaded


def test_an_upload_that_fails_says_where_the_result_is_and_what_to_do(hub: FakeHub, run_folder: Path) -> None:
    repository = prepare_repository(CONFIG, run_folder)
    assert repository is not None
    hub.repositories.clear()
    with pytest.raises(ValueError, match="could not be uploaded") as failed:
        push(CONFIG, run_folder, repository)
    message = str(failed.value)
    assert str(run_folder) in message
    assert WRITER not in message
    command = shlex.split(message.partition("`")[2].rpartition("`")[0])
    assert command == ["python3", "-m", "shared.publish", str(run_folder), "--hub_model_id", "me/circles"]
    assert {str(path.relative_to(run_folder)) for path in run_folder.rglob("*") if path.is_file()} >= KEPT


@pytest.mark.parametrize("part", ["/commit/", "/preupload/"])
@pytest.mark.parametrize("fault", [503, 429, 500, 0])
def test_an_upload_is_tried_again(hub: FakeHub, run_folder: Path, fault: int, part: str) -> None:
    """More often than huggingface_hub itself does."""
    repository = prepare_repository(CONFIG, run_folder)
    hub.faults, hub.faulty = [fault] * 20, part
    upload_result(CONFIG, run_folder, repository)
    assert set(hub.files) == KEPT
    assert f"{hub.address}/me/circles/commit/abc" in (run_folder / REPORT_FILE).read_text()


def test_an_upload_that_keeps_failing_is_made_up_for_by_the_same_command(hub: FakeHub, run_folder: Path) -> None:
    """And what is uploaded is not uploaded again."""
    repository = prepare_repository(CONFIG, run_folder)
    hub.faults, hub.faulty = [503] * 1000, "/commit/"
    with pytest.raises(ValueError, match=r"could not be uploaded .*503"):
        upload_result(CONFIG, run_folder, repository)
    assert not hub.files
    assert {str(path.relative_to(run_folder)) for path in run_folder.rglob("*") if path.is_file()} >= KEPT
    hub.faults.clear()
    upload_result(CONFIG, run_folder, repository)
    assert set(hub.files) == KEPT
    hub.requests.clear()
    upload_result(CONFIG, run_folder, repository)
    assert not hub.requests


def test_a_connection_that_breaks_off_while_large_files_are_sent(
    hub: FakeHub, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its part in Rust raises what it likes."""
    repository = prepare_repository(CONFIG, run_folder)
    assert repository is not None

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Data processing error: connection reset\nby peer")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", broken)
    with pytest.raises(ValueError, match=r"could not be uploaded .*connection reset by peer"):
        push(CONFIG, run_folder, repository)


def test_weights_in_several_files_are_uploaded_with_their_index(hub: FakeHub, run_folder: Path) -> None:
    weights = {
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    }
    for name in weights:
        (run_folder / name).write_text(f"content of {name}")
    repository = prepare_repository(CONFIG, run_folder)
    assert repository is not None
    push(CONFIG, run_folder, repository)
    assert set(hub.files) == KEPT | weights


def test_links_that_lead_out_of_the_folder_are_not_uploaded(
    hub: FakeHub, run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "1.png").write_text("private")
    (run_folder / "validation" / "step-8" / "[1]*.png").symlink_to(tmp_path / "private" / "1.png")
    (run_folder / "validation" / "step-12").symlink_to(tmp_path / "private")
    (run_folder / "validation" / "step-8" / "2.png").symlink_to("0.png")
    (run_folder / "report.json").unlink()
    (run_folder / "report.json").symlink_to(tmp_path / "private" / "1.png")
    repository = prepare_repository(CONFIG, run_folder)
    assert repository is not None
    with caplog.at_level("WARNING", logger="shared.run.hub"):
        push(CONFIG, run_folder, repository)
    assert set(hub.files) == KEPT - {"report.json"} | {"validation/step-8/2.png"}
    assert b"private" not in hub.files.values()
    assert "report.json is a link that leads out of the folder" in caplog.text
