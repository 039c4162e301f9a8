"""The README.md of a trained ControlNet, with the metadata that the Hub reads."""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from shared.config import TrainConfig, to_yaml
from shared.config.public import public_config
from shared.data.preprocessing import MODES
from shared.models.configs import ControlNetConfig, UNet2DConditionConfig
from shared.models.trained_parts import UNET_FOLDER
from shared.models.xl import is_xl
from shared.outgoing.atomic_files import write_text_atomically
from shared.run.licence import OPENRAIL_PLUS_PLUS, STABLE_DIFFUSION, Licence
from shared.untrusted import shown
from shared.untrusted.text import harmless

CARD_FILE = "README.md"

_TAGS = [  # after those of the base model's kind, as diffusers' scripts give them
    "text-to-image",
    "diffusers",
    "controlnet",
    "diffusers-training",
]

_USE = """```python
import torch
from diffusers import ControlNetModel, {pipeline}
from diffusers.utils import load_image

controlnet = ControlNetModel.from_pretrained({name})
pipeline = {pipeline}.from_pretrained({base_model}, controlnet=controlnet)
{condition}
image = pipeline("your prompt", image=condition).images[0]
```"""

_USE_WITH_ITS_UNET = """The decoder of the base model's UNet was trained too: the ControlNet belongs to the UNet in the
folder `{unet_folder}`.

```python
import torch
from diffusers import ControlNetModel, {pipeline}, UNet2DConditionModel
from diffusers.utils import load_image

controlnet = ControlNetModel.from_pretrained({name})
unet = UNet2DConditionModel.from_pretrained({name}, subfolder="{unet_folder}")
pipeline = {pipeline}.from_pretrained({base_model}, unet=unet, controlnet=controlnet)
{condition}
image = pipeline("your prompt", image=condition).images[0]
```"""

_CONDITION = 'condition = load_image("your_condition.png")'
# The pipelines make three channels of every picture, and leave tensors as they are.
_GREY_CONDITION = """grey = load_image("your_condition.png").convert("L").resize(({resolution}, {resolution}))
condition = torch.tensor(list(grey.tobytes())).reshape(1, 1, {resolution}, {resolution}) / 255"""


_SEVERAL_CONDITIONS = """modes = {modes}  # of your conditions, in the order of the training
pictures = [load_image(f"your_condition_{{n}}.png").convert(mode) for n, mode in enumerate(modes, start=1)]
pixels = [list(picture.resize(({resolution}, {resolution})).tobytes()) for picture in pictures]
channels = [torch.tensor(values).reshape(1, {resolution}, {resolution}, -1) for values in pixels]
condition = torch.cat(channels, dim=-1).permute(0, 3, 1, 2) / 255"""


@dataclass(frozen=True)
class BaseKind:
    """What a card says because of the kind of its base model.

    Attributes:
        tag: of diffusers' models.
        licence: that its base models usually have.
        pipeline: diffusers' class that uses the ControlNet.
    """

    tag: str
    licence: Licence
    pipeline: str


_SD_1 = BaseKind("stable-diffusion", STABLE_DIFFUSION, "StableDiffusionControlNetPipeline")
_SD_2 = BaseKind("stable-diffusion", OPENRAIL_PLUS_PLUS, "StableDiffusionControlNetPipeline")
_XL = BaseKind("stable-diffusion-xl", OPENRAIL_PLUS_PLUS, "StableDiffusionXLControlNetPipeline")
_TEXT_FEATURES_OF_SD_2 = 1024


def kind_of(unet: UNet2DConditionConfig | ControlNetConfig) -> BaseKind:
    """Told from the configuration of the UNet, or of a ControlNet for it."""
    if is_xl(unet):
        return _XL
    return _SD_2 if unet.cross_attention_dim == _TEXT_FEATURES_OF_SD_2 else _SD_1


_LONGEST = 1000  # characters of a text of others; a text encoder uses some 500
_MEANT = re.compile(
    r"[\\`*\[\]<&|~$@#]"  # whatever stands before and behind
    r"|(?<![^\W_])_|_(?![^\W_])"  # but not inside of a word
    r"|:(?=\S)|\.(?=[^\W\d])"  # of addresses, which become links by themselves
    r"|^[-+>=]"  # what begins a list or a quote
)
_NUMBERED = re.compile(r"^([0-9]{1,9})([.)])")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?")


def data_description(config: TrainConfig) -> str:
    """One phrase of Markdown for the data a run was trained on."""
    public = public_config(config)
    if public.generated_circles is not None:
        return f"{public.generated_circles} generated circles"
    return as_code(
        public.dataset_name or public.train_data_dir or public.cached_data or " ".join(public.train_shards or [])
    )


@dataclass(frozen=True)
class CardContent:
    """What is known of a finished run.

    Attributes:
        facts: what was measured (steps, images seen, final loss, hardware, versions), in the order to show.
        command: that trained it, without secrets; empty where it is not known.
        pictures: validation pictures inside of the run's folder, each with its prompt.
        kind, licence: of the base model.
    """

    facts: dict[str, Any]
    command: str
    pictures: list[tuple[Path, str]]
    kind: BaseKind
    licence: Licence


def model_card(output_dir: Path, config: TrainConfig, name: str, content: CardContent) -> str:
    """The text of `output_dir/README.md`; `name` is the repository or folder that users will load."""
    public, kind, licence = public_config(config), content.kind, content.licence
    base_model = str(public.pretrained_model_name_or_path)
    # The Hub refuses a card whose base model is not one of its repositories.
    is_on_the_hub = _HUB_NAME.fullmatch(base_model) is not None and not os.path.exists(base_model)
    metadata = ModelCardData(
        base_model=base_model if is_on_the_hub else None,
        library_name="diffusers",
        license=shown(licence.license),
        license_name=None if licence.name is None else shown(licence.name),
        license_link=None if licence.link is None else shown(licence.link, _LONGEST),
        tags=[kind.tag, f"{kind.tag}-diffusers", *_TAGS],
        inference=True,
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {as_text(name)}",
        f"ControlNet weights for {as_code(base_model)}, trained on {data_description(config)} at {config.resolution} "
        "px.",
        "## Use",
        (_USE_WITH_ITS_UNET if config.sd_unlocked else _USE).format(
            name=_as_python(name),
            base_model=_as_python(base_model),
            unet_folder=UNET_FOLDER,
            pipeline=kind.pipeline,
            condition=_condition(config),
        ),
        "## Training",
        "\n".join(_item(key, value) for key, value in content.facts.items()),
    ]
    if content.command:
        sections.append(_as_block(shown(content.command, sys.maxsize), "sh"))
    if content.pictures:
        sections.append("## Validation")
        sections.extend(
            f"{as_text(prompt)}\n\n![{as_text(prompt)}]({path.relative_to(output_dir)})"
            for path, prompt in content.pictures
        )
    sections.append(f"## Configuration\n\n{_as_block(to_yaml(public).strip(), 'yaml')}")
    return "\n\n".join(sections) + "\n"


def write_model_card(output_dir: Path, config: TrainConfig, name: str, content: CardContent) -> Path:
    """Write `output_dir/README.md`.

    Raises:
        OSError: it cannot be written.
    """
    card = output_dir / CARD_FILE
    write_text_atomically(card, model_card(output_dir, config, name, content))
    return card


def _condition(config: TrainConfig) -> str:
    """Lines of Python that make what a pipeline takes."""
    match config.channels_of_conditions:
        case (3,):
            return _CONDITION
        case (1,):
            return _GREY_CONDITION.format(resolution=config.resolution)
        case channels:
            modes = json.dumps([MODES[count] for count in channels])
            return _SEVERAL_CONDITIONS.format(modes=modes, resolution=config.resolution)


def _item(key: str, value: Any) -> str:
    return f"- {key}: {as_text(value) if isinstance(value, str) else value}"


def as_text(text: str) -> str:
    """Markdown that shows a text as it is, in one paragraph: nothing in it is markup, HTML or a link."""
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    escaped = _NUMBERED.sub(r"\1\\\2", _MEANT.sub(r"\\\g<0>", harmless(cut)))
    escaped = re.sub(r"^ +| +$", lambda blanks: "&#32;" * len(blanks[0]), escaped)  # four would begin code
    return escaped.replace("\n", "&#10;").replace("\t", "&#9;")


def as_code(text: str) -> str:
    """Markdown that shows a text as it is, as code inside of a line."""
    text = shown(text, _LONGEST)
    fence = "`" * (_longest_run(text) + 1)
    padding = " " if text[:1] in ("`", " ") or text[-1:] in ("`", " ") else ""
    return f"{fence}{padding}{text}{padding}{fence}" if text else ""


def _as_python(text: str) -> str:
    """A literal of the text, of one line."""
    return shown(json.dumps(text, ensure_ascii=False), sys.maxsize)


def _as_block(text: str, language: str) -> str:
    """A block of code that shows a text as it is."""
    # Only a line that begins with a fence can end it.
    fence = "`" * max(3, _longest_run(" ".join(re.findall(r"^\s*(`+)", text, re.MULTILINE))) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    """Of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
