import dataclasses
import importlib
import io
import json
import logging
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.config import TrainConfig
from shared.tracking import check_trackers, open_trackers

SECRET = "hf_thisIsASecretToken"


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return dataclasses.replace(
        TrainConfig(),
        report_to="none",
        output_dir=str(tmp_path / "run"),
        logging_dir="logs",
        tracker_project_name="circles",
        hub_token=SECRET,
        validation_prompt=("a red circle",),
    )


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def metrics_of(config: TrainConfig) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def events_of(config: TrainConfig) -> EventAccumulator:
    events = EventAccumulator(
        str(Path(config.output_dir) / "logs" / "circles"), size_guidance={"images": 0, "scalars": 0}
    )
    # TensorBoard announces each purge as a warning in its log.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    return events.Reload()


def test_metrics_are_lines_of_json_as_soon_as_they_are_logged(config: TrainConfig) -> None:
    tracker = open_trackers(config, Path(config.output_dir))
    tracker.log({"loss": 0.25, "grad_norm": 2.0}, 1)
    assert metrics_of(config) == [{"step": 1, "loss": 0.25, "grad_norm": 2.0}]
    tracker.log({"loss": math.nan, "grad_norm": math.inf}, 2)
    tracker.images("validation", [("a", np.zeros((8, 8, 3), np.uint8))], 2)
    assert metrics_of(config)[1:] == [{"step": 2, "loss": None, "grad_norm": None}]
    tracker.close()


@pytest.mark.parametrize("change", [0, -1, -86_400, -1_790_000_000])
def test_a_clock_that_stands_still_or_was_set_back_mixes_no_steps(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, change: int
) -> None:
    """Of a second start, whose figures take the place of what the first logged past step 3."""
    config = dataclasses.replace(config, report_to="tensorboard")
    now = 1_795_000_000.5
    for begun, seconds in ((0, now), (3, now + change), (3, now + change), (3, now)):
        monkeypatch.setattr("shared.tracking.tensorboard.time.time", lambda seconds=seconds: seconds)
        tracker = open_trackers(config, Path(config.output_dir))
        tracker.truncate_after(begun)
        for step in range(begun + 1, 6):
            tracker.log({"loss": 1.0}, step)
        tracker.close()
    assert [event.step for event in events_of(config).Scalars("loss")] == [1, 2, 3, 4, 5]
    names = sorted(path.name for path in (Path(config.output_dir) / "logs" / "circles").iterdir())
    assert len(names) == 8


def test_a_resumed_run_continues_its_metrics_without_repeating_steps(config: TrainConfig) -> None:
    first = open_trackers(config, Path(config.output_dir))
    for step in range(1, 6):
        first.log({"loss": float(step)}, step)
    first.close()
    with (Path(config.output_dir) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line

    resumed = open_trackers(config, Path(config.output_dir))
    resumed.truncate_after(3)
    resumed.log({"loss": 40.0}, 4)
    resumed.close()
    assert [(entry["step"], entry["loss"]) for entry in metrics_of(config)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_new_run_can_start_from_nothing(config: TrainConfig) -> None:
    for _ in range(2):
        tracker = open_trackers(config, Path(config.output_dir))
        tracker.truncate_after(-1)
        tracker.log({"loss": 1.0}, 0)
        tracker.close()
    assert len(metrics_of(config)) == 1


def test_tensorboard_reads_scalars_images_captions_and_configuration(config: TrainConfig) -> None:
    config = dataclasses.replace(config, report_to="tensorboard")
    image = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    tracker = open_trackers(config, Path(config.output_dir))
    tracker.log({"loss": 0.5, "learning_rate": 1e-5}, 1)
    tracker.log({"loss": math.nan}, 2)
    tracker.images("validation", [("a red circle", image), ("a blue one", image)], 2)
    tracker.close()

    events = events_of(config)
    assert (events.Scalars("loss")[0].step, events.Scalars("loss")[0].value) == (1, 0.5)
    assert math.isnan(events.Scalars("loss")[1].value)
    assert events.Scalars("learning_rate")[0].value == pytest.approx(1e-5)
    first, second = events.Images("validation/0")[0], events.Images("validation/1")[0]
    assert (first.step, first.height, first.width) == (2, 12, 10)
    assert first.encoded_image_string == second.encoded_image_string
    texts = [events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]]
    assert any("tracker_project_name: circles" in text for text in texts)
    assert any("0. a red circle" in text and "1. a blue one" in text for text in texts)
    assert len(metrics_of(config)) == 2


def test_tensorboard_images_are_the_pixels_given(config: TrainConfig) -> None:
    config = dataclasses.replace(config, report_to="tensorboard")
    image = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    tracker = open_trackers(config, Path(config.output_dir))
    tracker.images("validation", [("", image)], 1)
    tracker.close()
    encoded = events_of(config).Images("validation/0")[0].encoded_image_string
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), image)


def test_tensorboard_forgets_what_a_resumed_run_takes_again(config: TrainConfig) -> None:
    config = dataclasses.replace(config, report_to="tensorboard")
    tracker = open_trackers(config, Path(config.output_dir))
    for step in range(1, 6):
        tracker.log({"loss": float(step)}, step)
    tracker.close()
    resumed = open_trackers(config, Path(config.output_dir))
    resumed.truncate_after(3)
    resumed.log({"loss": 40.0}, 4)
    resumed.close()
    scalars = [(event.step, event.value) for event in events_of(config).Scalars("loss")]
    assert scalars == [(1, 1), (2, 2), (3, 3), (4, 40)]


@pytest.mark.parametrize("report_to", ["tensorboard", "none"])
def test_secrets_are_not_written(config: TrainConfig, report_to: Any) -> None:
    config = dataclasses.replace(config, report_to=report_to)
    tracker = open_trackers(config, Path(config.output_dir))
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    files = [path for path in Path(config.output_dir).rglob("*") if path.is_file()]
    assert files
    assert all(SECRET.encode() not in path.read_bytes() for path in files)


SHARDS = (
    "https://user:SECRET@host.example/a-{00..09}.tar?signature=SECRET",
    "pipe:curl -H 'Authorization: Bearer SECRET' https://host.example/b.tar",
)


def test_tensorboard_shows_shards_without_what_is_secret_in_their_addresses(config: TrainConfig) -> None:
    config = dataclasses.replace(config, report_to="tensorboard", train_shards=SHARDS, allow_shell_urls=True)
    open_trackers(config, Path(config.output_dir)).close()
    events = events_of(config)
    (text,) = [events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]]
    assert "- https://host.example/a-{00..09}.tar\n" in text
    assert "pipe:curl …" in text
    files = [path for path in Path(config.output_dir).rglob("*") if path.is_file()]
    assert not any(b"SECRET" in path.read_bytes() for path in files)


def test_wandb_gets_shards_without_what_is_secret_in_their_addresses(
    config: TrainConfig, fake_wandb: Any, no_login: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = dataclasses.replace(config, report_to="wandb", train_shards=SHARDS, allow_shell_urls=True)
    open_trackers(config, Path(config.output_dir)).close()
    url, command = fake_wandb.settings["config"]["train_shards"]
    assert url == "https://host.example/a-{00..09}.tar"
    assert command.startswith("pipe:curl … (sha256 ")
    assert "SECRET" not in str(fake_wandb.settings)


def test_tensorboard_needs_its_package(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboardX"):
        check_trackers(dataclasses.replace(config, report_to="tensorboard"))


def test_unknown_trackers_are_refused(config: TrainConfig) -> None:
    unknown: Any = "comet"
    with pytest.raises(ValueError, match="'comet'; expected tensorboard, wandb or none"):
        check_trackers(dataclasses.replace(config, report_to=unknown))


def test_importing_the_trackers_imports_no_deep_learning_framework() -> None:
    modules = "shared.tracking, shared.evaluation.image_grid"
    code = f"import sys, {modules}; print({{'torch', 'jax', 'tensorflow'}} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = False

    def log(self, entry: dict[str, Any], step: int) -> None:
        self.logged.append((entry, step))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """What this project uses of the wandb package, recording its calls."""
    record = types.SimpleNamespace(run=FakeRun(), settings=None)
    module: Any = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")

    def init(**settings: Any) -> FakeRun:
        record.settings = settings
        return record.run

    module.init = init
    module.Image = lambda image, caption: ("image", image.shape, caption)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return record


def test_wandb_needs_its_package(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether or not it is installed: with nowhere to look, no package can be found.
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [])
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="pip install wandb"):
        check_trackers(dataclasses.replace(config, report_to="wandb"))


def test_wandb_needs_a_login(config: TrainConfig, fake_wandb: Any, no_login: None, tmp_path: Path) -> None:
    config = dataclasses.replace(config, report_to="wandb")
    with pytest.raises(ValueError, match=r"api\.wandb\.ai.*wandb login"):
        check_trackers(config)
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password p\n")
    with pytest.raises(ValueError, match="no login"):
        open_trackers(config, Path(config.output_dir))
    assert fake_wandb.settings is None
    assert not Path(config.output_dir).exists()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password p\n")
    check_trackers(config)


@pytest.mark.parametrize(
    ("name", "value"), [("WANDB_API_KEY", "k"), ("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled")]
)
def test_wandb_logins_in_the_environment_count(
    config: TrainConfig, fake_wandb: Any, no_login: None, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    check_trackers(dataclasses.replace(config, report_to="wandb"))


def test_a_private_wandb_server_has_its_own_login(
    config: TrainConfig, fake_wandb: Any, no_login: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password p\n")
    config = dataclasses.replace(config, report_to="wandb")
    with pytest.raises(ValueError, match=r"wandb\.example"):
        check_trackers(config)
    (tmp_path / "netrc").write_text("machine wandb.example login user password p\n")
    check_trackers(config)


def test_an_unreadable_netrc_is_named(config: TrainConfig, fake_wandb: Any, no_login: None, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("nonsense here\n")
    with pytest.raises(ValueError, match="netrc cannot be read"):
        check_trackers(dataclasses.replace(config, report_to="wandb"))


def test_wandb_gets_project_entity_configuration_figures_and_images(
    config: TrainConfig, fake_wandb: Any, no_login: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = dataclasses.replace(config, report_to="wandb", wandb_entity="team", seed=7)
    tracker = open_trackers(config, Path(config.output_dir))
    tracker.log({"loss": 0.5}, 3)
    tracker.images("validation", [("a red circle", np.zeros((4, 5, 3), np.uint8))], 3)
    tracker.truncate_after(2)
    tracker.close()

    settings = fake_wandb.settings
    assert (settings["project"], settings["entity"], settings["dir"]) == ("circles", "team", config.output_dir)
    assert settings["config"]["seed"] == 7
    assert "hub_token" not in settings["config"]
    assert SECRET not in str(settings)
    assert fake_wandb.run.logged == [
        ({"loss": 0.5}, 3),
        ({"validation": [("image", (4, 5, 3), "a red circle")]}, 3),
    ]
    assert fake_wandb.run.finished
