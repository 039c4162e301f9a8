"""The README.md of a trained ControlNet, with the metadata that the Hub reads."""

from pathlib import Path
from typing import Any

import yaml

from shared.config import TrainConfig, to_yaml
from shared.config.public import public_config
from shared.trained_parts import UNET_FOLDER

_TAGS = [
    "stable-diffusion",
    "stable-diffusion-diffusers",
    "text-to-image",
    "diffusers",
    "controlnet",
    "diffusers-training",
]

_USE = """```python
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.utils import load_image

controlnet = ControlNetModel.from_pretrained("{name}")
pipeline = StableDiffusionControlNetPipeline.from_pretrained("{base_model}", controlnet=controlnet)
image = pipeline("your prompt", image=load_image("your_condition.png")).images[0]
```"""

_USE_WITH_ITS_UNET = """The decoder of the base model's UNet was trained too: the ControlNet belongs to the UNet in the
folder `{unet_folder}`.

```python
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from diffusers.utils import load_image

controlnet = ControlNetModel.from_pretrained("{name}")
unet = UNet2DConditionModel.from_pretrained("{name}", subfolder="{unet_folder}")
pipeline = StableDiffusionControlNetPipeline.from_pretrained("{base_model}", unet=unet, controlnet=controlnet)
image = pipeline("your prompt", image=load_image("your_condition.png")).images[0]
```"""


def data_description(config: TrainConfig) -> str:
    """One phrase for the data a run was trained on."""
    if config.generated_circles is not None:
        return f"{config.generated_circles} generated circles"
    return f"`{config.dataset_name or config.train_data_dir or ' '.join(public_config(config).train_shards or [])}`"


def write_model_card(
    output_dir: Path, config: TrainConfig, *, name: str, facts: dict[str, Any], pictures: list[tuple[Path, str]]
) -> Path:
    """Write `output_dir/README.md`.

    Args:
        name: the repository or folder that users will load.
        facts: what was measured (steps, images seen, final loss, hardware, versions), in the order to show.
        pictures: validation pictures inside `output_dir`, each with its prompt.
    """
    base_model = str(config.pretrained_model_name_or_path)
    metadata = {
        # The Hub refuses a card whose base model is not one of its repositories.
        **({} if Path(base_model).exists() else {"base_model": base_model}),
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "tags": _TAGS,
        "inference": True,
    }
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {name}",
        f"ControlNet weights for `{base_model}`, trained on {data_description(config)} at {config.resolution} px.",
        "## Use",
        (_USE_WITH_ITS_UNET if config.sd_unlocked else _USE).format(
            name=name, base_model=base_model, unet_folder=UNET_FOLDER
        ),
        "## Training",
        "\n".join(f"- {key}: {value}" for key, value in facts.items()),
    ]
    if pictures:
        sections.append("## Validation")
        sections.extend(f"{prompt}\n\n![{prompt}]({path.relative_to(output_dir)})" for path, prompt in pictures)
    sections.append(f"## Configuration\n\n```yaml\n{to_yaml(public_config(config)).strip()}\n```")
    card = output_dir / "README.md"
    card.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return card
