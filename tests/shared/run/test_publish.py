"""`python3 -m shared.publish` against a small Hub of our own: what is uploaded, and what is refused before."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from flax_trainer.random_model import ARCHITECTURES
from shared import publish
from shared.config import TrainConfig, to_yaml
from shared.models.configs import ControlNetConfig, UNet2DConditionConfig
from shared.run.folder import write_config
from shared.run.model_card import kind_of, write_model_card
from shared.run.result import card_content
from tests.shared.run.fake_hub import READER, WRITER, FakeHub

CONTROLNET = ControlNetConfig.from_unet_config(UNet2DConditionConfig.from_dict(ARCHITECTURES["tiny"].unet))
COMMAND = "python3 train_flax.py --seed 3"
REPORT: dict[str, Any] = {
    "steps": 4,
    "images_seen": 32,
    "devices": "1 × cpu",
    "versions": {"jax": "0.10.2"},
    "command": COMMAND,
    "circle_iou": 0.5,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run's folder, its card included."""
    folder, base_model = tmp_path / "circles", tmp_path / "base"
    base_model.mkdir()
    (base_model / "README.md").write_text("---\nlicense: other\nlicense_name: house\n---\n")
    config = TrainConfig(
        pretrained_model_name_or_path=str(base_model),
        generated_circles=8,
        validation_image=("a.png", "b.png"),
        validation_prompt=("a red circle",),
        output_dir=str(folder),
    )
    (folder / "validation" / "step-4").mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "logs" / "events").write_text("private")
    pictures = [folder / "validation" / "step-4" / f"{pair}.png" for pair in range(2)]
    for path in pictures:
        path.write_bytes(b"a picture")
    (folder / "report.json").write_text(json.dumps(REPORT))
    (folder / "config.json").write_text(json.dumps(CONTROLNET.to_dict()))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    write_config(folder, config)
    kind = kind_of(CONTROLNET)
    content = card_content(REPORT, [(path, "a red circle") for path in pictures], kind, kind.licence)
    write_model_card(folder, config, "circles", content)
    return folder


def published(run: Path, *more: str) -> int:
    return publish.main([str(run), "--hub_token", WRITER, *more])


def test_a_run_is_uploaded_with_a_card_that_names_its_repository(
    hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert published(run, "--hub_model_id", "me/controlnet-circles") == 0
    assert f"Uploaded: {hub.address}/me/controlnet-circles/commit/abc" in capsys.readouterr().out
    assert set(hub.files) == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "report.json",
        "validation/step-4/0.png",
        "validation/step-4/1.png",
    }
    card = ModelCard(hub.files["README.md"].decode())
    assert 'ControlNetModel.from_pretrained("me/controlnet-circles")' in card.text
    data = card.data.to_dict()
    assert {"controlnet", "diffusers"} <= set(data["tags"])
    assert (data["license"], data["license_name"]) == ("other", "house")
    for told in (COMMAND, "- circle_iou: 0.5", "8 generated circles", "![a red circle](validation/step-4/1.png)"):
        assert told in card.text
    assert all(WRITER.encode() not in content for content in hub.files.values())


def test_figures_that_are_none_are_not_put_on_the_card(hub: FakeHub, run: Path) -> None:
    (run / "report.json").write_text(json.dumps(REPORT | {"circle_iou": ["<script>", 1], "edge_f1": "![x](y)"}))
    (run / "README.md").unlink()
    assert published(run) == 0
    for forged in (b"script", b"circle_iou", b"edge_f1"):
        assert forged not in hub.files["README.md"]


def test_once_more_the_card_stays(hub: FakeHub, run: Path) -> None:
    assert published(run) == 0
    first = hub.files["README.md"]
    assert published(run) == 0
    assert hub.files["README.md"] == first == (run / "README.md").read_bytes()


def test_a_card_that_was_changed_by_hand_is_kept(hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = (run / "README.md").read_text() + "\nTrained on my own photographs.\n"
    (run / "README.md").write_text(own)
    assert published(run, "--hub_model_id", "me/other") == 0
    assert hub.files["README.md"].decode() == own
    assert "stays as it is" in capsys.readouterr().err


def test_a_run_without_a_card_gets_one(hub: FakeHub, run: Path) -> None:
    (run / "README.md").unlink()
    assert published(run) == 0
    assert b'from_pretrained("me/circles")' in hub.files["README.md"]


def test_the_command_that_an_upload_that_failed_tells_can_be_run(
    hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults, hub.faulty = [403], "/commit/"
    assert published(run) == 2
    message = capsys.readouterr().err
    words = shlex.split(message.partition("`")[2].partition("`")[0])
    assert words[:3] == ["python3", "-m", "shared.publish"]
    assert "403" in message
    assert publish.main([*words[3:], "--hub_token", WRITER]) == 0
    assert hub.files["diffusion_pytorch_model.safetensors"] == b"weights"


def _no_config(run: Path) -> None:
    (run / "config.yaml").unlink()


def _no_report(run: Path) -> None:
    (run / "report.json").unlink()


def _not_written(run: Path) -> None:
    (run / "report.json").write_text(json.dumps(REPORT | {"not_written": ["ControlNet"]}))


def _no_controlnet(run: Path) -> None:
    (run / "config.json").unlink()


def _no_command(run: Path) -> None:
    (run / "report.json").write_text(json.dumps(REPORT | {"command": 7}))


def _other_yaml(run: Path) -> None:
    (run / "config.yaml").write_text(to_yaml(TrainConfig()).replace("seed:", "sed:"))


def _other_json(run: Path) -> None:
    (run / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_no_config, "has no config.yaml"),
        (_no_report, "holds no finished run"),
        (_not_written, "holds no finished run"),
        (_no_controlnet, "holds no finished run"),
        (_no_command, "tells no command"),
        (_other_yaml, "sed is not a flag"),
        (_other_json, "config.json"),
    ],
)
def test_what_is_no_finished_run_is_refused_before_the_hub_is_asked(
    hub: FakeHub, run: Path, damage: Callable[[Path], None], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run)
    assert published(run) == 2
    assert told in capsys.readouterr().err
    assert hub.requests == []


def test_a_token_that_may_not_write_is_told_without_being_shown(
    hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish.main([str(run), "--hub_token", READER]) == 2
    message = capsys.readouterr().err
    assert "cannot be written to on the Hub" in message
    assert "--push_to_hub" not in message
    assert READER not in message


def test_nobody_logged_in(hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.main([str(run)]) == 2
    assert "there is no login on the Hub" in capsys.readouterr().err
