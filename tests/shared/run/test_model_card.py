"""The model card, read by huggingface_hub."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from shared.config import TrainConfig, parse_command_line
from shared.data.preprocessing import preprocess
from shared.outgoing.redaction import redacted
from shared.run.model_card import as_code, as_text, data_description, write_model_card
from shared.untrusted.text import harmless
from tests.shared.data.pictures import png
from tests.shared.run.cards import content, kind

CONFIG = TrainConfig(
    pretrained_model_name_or_path="stable-diffusion-v1-5/stable-diffusion-v1-5",
    train_data_dir="photos",
    resolution=256,
    push_to_hub=True,
    hub_token="hf_secret",
)


def card(folder: Path, config: TrainConfig = CONFIG, **changes: Any) -> ModelCard:
    name = changes.pop("name", "me/circles")
    path = write_model_card(folder, config, name, content(**changes))
    assert path == folder / "README.md"
    return ModelCard.load(path)


def test_the_hub_reads_the_metadata(tmp_path: Path) -> None:
    data = card(tmp_path).data.to_dict()
    assert data["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert data["library_name"] == "diffusers"
    assert data["license"] == "creativeml-openrail-m"
    assert {"controlnet", "diffusers", "text-to-image"} <= set(data["tags"])
    assert data["tags"][:2] == ["stable-diffusion", "stable-diffusion-diffusers"]


def test_a_controlnet_for_xl_says_so(tmp_path: Path) -> None:
    """As diffusers' train_controlnet_sdxl.py: the licence of its base model, its tags, its pipeline."""
    for sd_unlocked in (False, True):
        written = card(
            tmp_path,
            dataclasses.replace(CONFIG, sd_unlocked=sd_unlocked),
            kind=kind("sdxl"),
            licence=kind("sdxl").licence,
        )
        data = written.data.to_dict()
        assert data["license"] == "openrail++"
        assert data["tags"][:2] == ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"]
        assert "pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(" in written.text
        assert "StableDiffusionControlNetPipeline" not in written.text


def test_a_grey_condition_is_given_as_training_gave_it(tmp_path: Path) -> None:
    """diffusers' pipelines make RGB of pictures, and take a tensor [B,C,H,W] of values from 0 to 1 as it is."""
    path = tmp_path / "your_condition.png"
    path.write_bytes(png(0, 256, 256))
    for sd_unlocked in (False, True):
        config = dataclasses.replace(CONFIG, conditioning_channels=(1,), sd_unlocked=sd_unlocked)
        code = card(tmp_path, config).text.partition("```python\n")[2].partition("```")[0]
        compile(code, "README.md", "exec")
        assert "image=condition)" in code
        lines = [line for line in code.splitlines() if line.startswith(("grey =", "condition ="))]
        names: dict[str, Any] = {"torch": torch, "load_image": lambda name: PIL.Image.open(tmp_path / name)}
        exec("\n".join(lines), names)
        expected = preprocess(path, 256, "bilinear", channels=1)[None, None, :, :, 0] / 255
        np.testing.assert_allclose(names["condition"], expected, rtol=1e-6)


def test_several_conditions_are_given_side_by_side(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"your_condition_{number}.png").write_bytes(png(number, 256, 256))
    config = dataclasses.replace(CONFIG, conditioning_image_column=("depth", "canny"), conditioning_channels=(1, 3))
    code = card(tmp_path, config).text.partition("```python\n")[2].partition("```")[0]
    compile(code, "README.md", "exec")
    assert "image=condition)" in code
    beginnings = ("modes =", "pictures =", "pixels =", "channels =", "condition =")
    lines = [line for line in code.splitlines() if line.startswith(beginnings)]
    names: dict[str, Any] = {"torch": torch, "load_image": lambda name: PIL.Image.open(tmp_path / name)}
    exec("\n".join(lines), names)
    parts = [
        preprocess(tmp_path / f"your_condition_{number}.png", 256, "bilinear", channels)
        for number, channels in ((1, 1), (2, 3))
    ]
    expected = np.concatenate(parts, axis=-1).transpose(2, 0, 1)[None] / 255
    np.testing.assert_allclose(names["condition"], expected, rtol=1e-6)


def test_a_base_model_on_this_machine_is_no_base_model_of_the_hub(tmp_path: Path, base_model: Path) -> None:
    config = TrainConfig(pretrained_model_name_or_path=str(base_model), generated_circles=8)
    written = card(tmp_path, config)
    assert "base_model" not in written.data.to_dict()
    assert str(base_model) in written.text


def test_it_says_what_was_trained_on_what_and_how_it_went(tmp_path: Path) -> None:
    text = card(tmp_path, facts={"Optimizer steps": 12, "Hardware": "4 × TPU v4"}).text
    assert text.startswith("# me/circles\n") or "\n# me/circles\n" in text
    for expected in ("`photos`", "256 px", "- Optimizer steps: 12\n- Hardware: 4 × TPU v4"):
        assert expected in text
    assert 'ControlNetModel.from_pretrained("me/circles")' in text


def test_the_example_is_python_with_the_names_of_the_run(tmp_path: Path) -> None:
    code = card(tmp_path).text.partition("```python\n")[2].partition("```")[0]
    compile(code, "README.md", "exec")
    assert '"stable-diffusion-v1-5/stable-diffusion-v1-5"' in code


def test_a_trained_decoder_is_mentioned_and_loaded(tmp_path: Path) -> None:
    text = card(tmp_path, dataclasses.replace(CONFIG, sd_unlocked=True)).text
    assert "decoder of the base model's UNet was trained too" in text
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "README.md", "exec")
    assert 'UNet2DConditionModel.from_pretrained("me/circles", subfolder="unet")' in code
    assert "unet=unet" in code


def test_pictures_are_linked_from_where_the_card_lies(tmp_path: Path) -> None:
    picture = tmp_path / "validation" / "step-12" / "0.png"
    text = card(tmp_path, pictures=[(picture, "a red circle")]).text
    assert "a red circle\n\n![a red circle](validation/step-12/0.png)" in text
    assert str(tmp_path) not in text.partition("## Configuration")[0]


def test_without_pictures_there_is_no_validation_section(tmp_path: Path) -> None:
    assert "## Validation" not in card(tmp_path).text


@given(st.sampled_from(["a 'quoted' one", "two\nlines", "---", "```", "yes", "k: v", "naïve 猫"]))
def test_the_configuration_in_it_is_the_runs_and_holds_no_secret(
    tmp_path_factory: pytest.TempPathFactory, prompt: str
) -> None:
    folder = tmp_path_factory.mktemp("card")
    config = TrainConfig(**{**vars(CONFIG), "validation_prompt": (prompt,), "validation_image": ("c.png",)})
    text = card(folder, config).content
    assert "hf_secret" not in text
    assert "hub_token" not in text
    (folder / "config.yaml").write_text(text.partition("```yaml\n")[2].rpartition("```")[0], encoding="utf-8")
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["validation_prompt"] == [prompt]
    read = parse_command_line(["--config", str(folder / "config.yaml")], "flax")
    assert read == TrainConfig(**{**vars(config), "hub_token": None})


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ({"generated_circles": 50}, "50 generated circles"),
        ({"dataset_name": "fusing/fill50k"}, "`fusing/fill50k`"),
        ({"train_data_dir": "photos"}, "`photos`"),
        ({"train_shards": ("a.tar", "b-{00..09}.tar")}, "`a.tar b-{00..09}.tar`"),
    ],
)
def test_every_kind_of_data_has_its_phrase(source: dict[str, Any], phrase: str) -> None:
    assert data_description(TrainConfig(**source)) == phrase


def test_shards_are_named_without_what_is_secret_in_their_addresses(tmp_path: Path) -> None:
    shards = (
        "data/a-{00..09}.tar",
        "https://user:SECRET@host.example/b.tar?signature=SECRET",
        "pipe:curl -H 'Authorization: Bearer SECRET' https://host.example/c.tar",
    )
    config = TrainConfig(pretrained_model_name_or_path="some/model", train_shards=shards, allow_shell_urls=True)
    phrase = data_description(config)
    assert phrase.startswith("`data/a-{00..09}.tar https://host.example/b.tar pipe:curl … (sha256 ")
    written = card(tmp_path, config, facts={"Data": phrase}).content
    assert "SECRET" not in written
    assert phrase in written
    named = yaml.safe_load(written.partition("```yaml\n")[2].rpartition("```")[0])["train_shards"]
    assert named[:2] == ["data/a-{00..09}.tar", "https://host.example/b.tar"]
    assert "SECRET" in str(config.train_shards), "the run itself still needs it"


HOSTILE_TEXTS = (
    "<script>alert(1)</script>",
    "![x](https://example.com/track.png)",
    "[x](javascript:alert(1))",
    "[x]: https://example.com",
    "a trailing backslash \\",
    "`code` ``` and ```` more",
    "```",
    "~~~",
    "---",
    "line\nbreak\n\n# a heading\n---\n> quoted",
    "&lt;b&gt; &#x3c;b&#x3e; &copy;",
    "a | b | c",
    "<https://example.com> https://example.com www.example.com someone@example.com",
    "*a* _b_ **c** __d__ ~~e~~ snake_case",
    "# a heading #",
    "- a list",
    "+ a list",
    "* a list",
    "1. a list",
    "123456789) a list",
    "    code",
    "\tcode",
    "trailing blanks  ",
    "> quoted",
    "===",
    "$x^2$ \\(x\\) :smile: @someone #12",
    "<!-- comment -->",
    "<?php ?>",
    "{{ name }} {name} %s",
    'a "quoted" and \'quoted\' "name"',
    "naïve 猫 🐈",
    "\x1b[31mred\x07 \u202eevil",
    "a (masterpiece:1.2), high-quality photo, e.g. of 3.5 cats.",
)


def tokens_of(markdown: str) -> Iterator[Token]:
    for token in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown):
        yield token
        yield from token.children or ()


def text_of(markdown: str) -> str:
    return "".join(token.content for token in tokens_of(markdown) if token.type in ("text", "code_inline"))


def made_of(markdown: str) -> set[str]:
    return {token.type for token in tokens_of(markdown)}


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_texts_are_texts_in_markdown(text: str) -> None:
    assert text_of(as_text(text)) == harmless(text)
    assert made_of(as_text(text)) == {"paragraph_open", "inline", "text", "paragraph_close"}


@given(st.text(st.sampled_from("\\`*_[]()<>!&#|~-+=.: \n1a;\"'$@"), min_size=1, max_size=40))
def test_any_text_is_a_text_in_markdown(text: str) -> None:
    assert text_of(f"- x: {as_text(text)}") == f"x: {text}"
    assert made_of(as_text(text)) <= {"paragraph_open", "inline", "text", "paragraph_close"}
    assert "\n" not in as_text(text)


@given(st.text(st.sampled_from("`\\ <a&*_|"), min_size=1, max_size=20).filter(str.strip))
def test_any_name_is_code_in_markdown(text: str) -> None:
    assert text_of(f"x {as_code(text)} y") == f"x {text} y"
    assert made_of(f"x {as_code(text)} y") == {"paragraph_open", "inline", "text", "code_inline", "paragraph_close"}


def test_texts_of_any_length_are_cut() -> None:
    assert len(as_text("<" * 10**7)) < 5000
    assert len(as_code("`" * 10**7)) < 5000


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
@pytest.mark.parametrize("sd_unlocked", [False, True])
def test_whatever_a_card_takes_over_stays_what_it_is(tmp_path: Path, text: str, sd_unlocked: bool) -> None:
    """The same sections, one picture, one list, and two blocks of code, whatever they are called."""
    config = TrainConfig(
        pretrained_model_name_or_path=text,
        train_data_dir=text,
        validation_prompt=(text, f"{'long ' * 22}{text}"),
        validation_image=("c.png",),
        sd_unlocked=sd_unlocked,
    )
    picture = tmp_path / "validation" / "step-12" / "0.png"
    written = card(tmp_path, config, name=text, facts={"Steps": 1, "Hardware": text}, pictures=[(picture, text)])
    plain = dataclasses.replace(CONFIG, sd_unlocked=sd_unlocked)
    usual = card(tmp_path, plain, name="x", facts={"Steps": 1, "Hardware": "x"}, pictures=[(picture, "x")])
    ours = {"text", "code_inline", "softbreak"}
    tokens = list(tokens_of(written.text))
    both = (tokens, tokens_of(usual.text))
    kinds, usual_kinds = ([token.type for token in side if token.type not in ours] for side in both)
    assert kinds == usual_kinds
    (image,) = (token for token in tokens if token.type == "image")
    assert image.attrs["src"] == "validation/step-12/0.png"
    assert "".join(child.content for child in image.children or ()) == harmless(text)
    assert {"text", "softbreak"} >= {child.type for child in image.children or ()}
    assert written.data.to_dict().get("base_model") is None
    assert written.data.to_dict()["library_name"] == "diffusers"

    code, command, settings = (token for token in tokens if token.type == "fence")
    assert command.content == "python3 train_flax.py --seed 3\n"
    assert names_in(code.content) == {text, redacted(text)} | ({"unet"} if sd_unlocked else set())
    assert yaml.safe_load(settings.content)["train_data_dir"] == redacted(text)


def names_in(code: str) -> set[str]:
    """The first argument of every `from_pretrained`, and the subfolder."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    loads = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"]
    assert len(loads) >= 2
    folders = [word.value for call in loads for word in call.keywords if word.arg == "subfolder"]
    return {ast.literal_eval(node) for node in [*(call.args[0] for call in loads), *folders]}


def test_a_link_in_the_cards_place_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    private = tmp_path / "private.txt"
    private.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").symlink_to(private)
    card(tmp_path / "run")
    assert private.read_text() == "mine"
