"""What a run may make of its folder, and what it leaves to others."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from shared.config import TrainConfig
from shared.run.folder import NOT_WRITTEN, held_run_folder, is_finished, make_run_folder, write_config, write_report

SECRET_SHARDS = ("https://user:password@host.example/{00..09}.tar",)


@pytest.mark.parametrize(
    "name",
    [
        "pretrained_model_name_or_path",
        "pretrained_vae_model_name_or_path",
        "controlnet_model_name_or_path",
        "tokenizer_name",
        "train_data_dir",
        "dataset_name",
    ],
)
@pytest.mark.parametrize("way", ["itself", "link", "detour"])
def test_a_folder_that_the_run_reads_is_not_the_runs(tmp_path: Path, name: str, way: str) -> None:
    read = tmp_path / "read"
    read.mkdir()
    (tmp_path / "link").symlink_to(read)
    output_dir = {"itself": read, "link": tmp_path / "link", "detour": tmp_path / "link" / ".." / "read"}[way]
    settings: dict[str, Any] = {name: str(read)}
    with pytest.raises(ValueError, match=f"--output_dir .* is the folder that --{name} reads"):
        make_run_folder(TrainConfig(output_dir=str(output_dir), **settings))
    assert list(read.iterdir()) == []
    assert make_run_folder(TrainConfig(output_dir=str(tmp_path / "run"), **settings)) == tmp_path / "run"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_of_the_base_model_is_not_the_runs_folder(tmp_path: Path, part: str) -> None:
    (tmp_path / part).mkdir()
    with pytest.raises(ValueError, match="whose files the run's own would mix with or overwrite"):
        make_run_folder(TrainConfig(output_dir=str(tmp_path / part), pretrained_model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize("prefix", ["", "file:", "file://"])
def test_the_folder_of_shards_is_not_the_runs(tmp_path: Path, prefix: str) -> None:
    settings = TrainConfig(output_dir=str(tmp_path), train_shards=(f"{prefix}{tmp_path}/a-{{00..09}}.tar",))
    with pytest.raises(ValueError, match="is the folder of --train_shards"):
        make_run_folder(settings)


@pytest.mark.parametrize("name", ["a\x00b", "x" * 300, "\ud83d", "/dev/null/run", "/proc/run"])
def test_a_folder_that_cannot_be_made_is_told(name: str) -> None:
    with pytest.raises(ValueError, match=r"--output_dir .*cannot be made") as error:
        make_run_folder(TrainConfig(output_dir=name))
    assert str(error.value).isprintable()


def test_a_configuration_with_credentials_is_the_users_own(tmp_path: Path) -> None:
    for shards, mode in ((SECRET_SHARDS, 0o600), (("a.tar",), 0o666)):
        before = os.umask(0o022)
        try:
            write_config(tmp_path, TrainConfig(output_dir=str(tmp_path), train_shards=shards))
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode) == mode & ~0o022
        assert shards[0] in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["config.yaml", "report.json"])
def test_planted_links_are_replaced_and_not_followed(tmp_path: Path, name: str) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    folder.mkdir()
    elsewhere.write_text("mine")
    (folder / name).symlink_to(elsewhere)
    (folder / f"{name}.tmp").symlink_to(elsewhere)
    if name == "config.yaml":
        write_config(folder, TrainConfig())
    else:
        write_report(folder, {"steps": 1})
    assert elsewhere.read_text() == "mine"
    assert not (folder / name).is_symlink()


def test_a_configuration_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(ValueError, match=r"config\.yaml cannot be written"):
        write_config(tmp_path, TrainConfig())


@pytest.mark.parametrize("content", [b"[]", b"null", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"", b'"steps"'])
def test_a_report_that_is_none_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"report\.json"):
        is_finished(tmp_path, 10, 10)


@pytest.mark.parametrize("steps", [True, "1", 1.0, None, [1], {"steps": 1}])
def test_steps_of_a_report_are_a_number(tmp_path: Path, steps: Any) -> None:
    write_report(tmp_path, {"steps": steps})
    assert not is_finished(tmp_path, 1, 1)


def test_what_takes_the_reports_place_finishes_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.json")
    assert not is_finished(tmp_path, 1, 1)
    write_report(tmp_path, {"steps": 1})
    assert is_finished(tmp_path, 1, 1)


def test_a_run_whose_weights_had_no_room_is_not_finished(tmp_path: Path) -> None:
    write_report(tmp_path, {"steps": 1, NOT_WRITTEN: ["the ControlNet"]})
    assert not is_finished(tmp_path, 1, 1)


def test_a_held_folder_is_made_and_left_as_it_was(tmp_path: Path) -> None:
    settings = TrainConfig(output_dir=str(tmp_path / "a" / "run"))
    with held_run_folder(settings), pytest.raises(ValueError, match="in use"), held_run_folder(settings):
        pass
    assert list((tmp_path / "a" / "run").iterdir()) == []


def test_a_held_folder_gives_a_checkpoint_its_name_back(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3.replaced").mkdir()
    with held_run_folder(TrainConfig(output_dir=str(tmp_path))):
        assert (tmp_path / "checkpoint-3").is_dir()


def test_a_held_folder_is_without_what_a_killed_run_was_writing(tmp_path: Path) -> None:
    folders = [tmp_path, tmp_path / "unet", tmp_path / "validation" / "step-4"]
    left = [folder / ".weights.safetensors.0123abcd.tmp" for folder in folders]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with held_run_folder(TrainConfig(output_dir=str(tmp_path))):
        assert not any(path.exists() for path in left)


def test_a_name_that_cannot_be_given_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint-3.replaced").mkdir()

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", fail)
    settings = TrainConfig(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="Permission denied"), held_run_folder(settings):
        pass
    assert not (tmp_path / ".lock").exists()


def test_a_full_disk_leaves_the_configuration_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path, TrainConfig(seed=1))
    before = (tmp_path / "config.yaml").read_bytes()

    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(ValueError, match="No space left on device"):
        write_config(tmp_path, TrainConfig(seed=2))
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
