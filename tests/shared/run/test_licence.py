"""The licence that a base model's card tells, in folders and in front matter that huggingface_hub writes."""

import logging
from pathlib import Path

import pytest
from huggingface_hub import ModelCardData

from shared.config import TrainConfig
from shared.models.source import ModelSource
from shared.run.licence import OPENRAIL_PLUS_PLUS, STABLE_DIFFUSION, Licence, licence_of
from shared.user_errors import UserError
from tests.shared.run.cards import kind

USUAL = STABLE_DIFFUSION


def told_by(folder: Path, card: str | bytes) -> Licence:
    (folder / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    return licence_of(TrainConfig(pretrained_model_name_or_path=str(folder)), USUAL, asks_hub=True)


@pytest.mark.parametrize(
    "licence",
    [
        Licence("mit"),
        Licence("openrail++"),
        Licence("other", "stabilityai-ai-community", "https://example.com/LICENSE.md"),
        Licence("cc-by-nc-4.0"),
    ],
)
def test_what_huggingface_hub_writes_is_read(tmp_path: Path, licence: Licence) -> None:
    data = ModelCardData(license=licence.license, license_name=licence.name, license_link=licence.link, tags=["a: b"])
    assert told_by(tmp_path, f"---\n{data.to_yaml()}\n---\n# Model\nlicense: apache-2.0\n") == licence


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# A model without metadata\nlicense: mit",
        "---\nlicense: mit\n# never ends",
        "---\ntags: [a]\n---\n",
        "---\nlicense: [mit, apache-2.0]\n---\n",
        "---\nlicense: 7\n---\n",
        "---\nlicense: !!python/object/apply:os.system [id]\n---\n",
        "---\nlicense: " + 400 * "m" + "\n---\n",
        '---\nlicense: "a\\nb"\n---\n',
        "---\nlicense: {a: &a [x], b: *a\n---\n",
        b"---\n\xff\xfe\n---\n",
        "---\nlicense: 2026-99-99\n---\n".replace("2026-99-99", "2026-02-30"),
    ],
)
def test_where_none_is_told_it_is_the_usual_one_and_the_log_says_so(
    tmp_path: Path, card: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shared.run.licence")
    told = told_by(tmp_path, card)
    assert told == USUAL or told.license == "2026-02-30"
    if told == USUAL:
        assert "put down as creativeml-openrail-m" in caplog.text


def test_a_card_that_is_no_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    assert licence_of(TrainConfig(pretrained_model_name_or_path=str(tmp_path)), USUAL, asks_hub=False) == USUAL


def test_a_model_on_the_hub_is_looked_up_where_the_network_is_needed_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "card").write_text("---\nlicense: mit\n---\n")
    asked = []

    def download(source: ModelSource, name: str) -> Path:
        asked.append((source.path_or_repo, name))
        return tmp_path / "card"

    monkeypatch.setattr(ModelSource, "optional_file", download)
    config = TrainConfig(pretrained_model_name_or_path="some/model")
    assert licence_of(config, USUAL, asks_hub=False) == USUAL
    assert licence_of(config, USUAL, asks_hub=True) == Licence("mit")
    assert asked == [("some/model", "README.md")]


def test_a_hub_that_cannot_be_asked_leaves_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: ModelSource, name: str) -> Path:
        raise UserError("no network")

    monkeypatch.setattr(ModelSource, "optional_file", fail)
    assert licence_of(TrainConfig(pretrained_model_name_or_path="some/model"), USUAL, asks_hub=True) == USUAL


def test_the_usual_ones() -> None:
    usual = {name: kind(name).licence for name in ("sd15", "sd21", "sdxl")}
    assert usual == {"sd15": STABLE_DIFFUSION, "sd21": OPENRAIL_PLUS_PLUS, "sdxl": OPENRAIL_PLUS_PLUS}
