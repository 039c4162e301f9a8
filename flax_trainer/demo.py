"""The built-in demo: `python3 train_flax.py` without flags. It needs no network, no data and no accelerator."""

from pathlib import Path

from flax_trainer.random_model import write_random_model
from shared.data.sources.circles import draw

RESOLUTION = 64
SEED = 0
_FOLDER = Path("runs/demo")
_VALIDATION_SEED = 1  # circles that training, which draws with SEED, never sees
_VALIDATION_CIRCLES = 4


def prepare_demo() -> list[str]:
    """Write the base model and validation conditions below `runs/demo`; returns the command line to train with."""
    base = _FOLDER / "base-model"
    write_random_model("tiny", base)
    images, prompts = [], []
    for index in range(_VALIDATION_CIRCLES):
        circle = draw(index, RESOLUTION, _VALIDATION_SEED)
        path = _FOLDER / f"condition-{index}.png"
        circle.conditioning_image.save(path)
        images.append(str(path))
        prompts.append(circle.truth.caption)
    return [
        *("--pretrained_model_name_or_path", str(base)),
        *("--generated_circles", "1024"),
        *("--resolution", str(RESOLUTION)),
        *("--train_batch_size", "8"),
        *("--max_train_steps", "100"),
        *("--learning_rate", "1e-4"),
        *("--validation_image", *images),
        *("--validation_prompt", *prompts),
        *("--validation_steps", "50"),
        *("--num_validation_images", "1"),
        *("--seed", str(SEED)),
        *("--output_dir", str(_FOLDER / "{timestamp}")),
    ]
