"""The flags of `python3 -m flax_trainer.evaluate` and `python3 -m torch_trainer.evaluate`, declared once."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from shared.config import TrainConfig
from shared.config.flags import Flag, at_least, at_most, flag, flags_of
from shared.config.options import InterpolationMode, MismatchedPairs, as_in_training
from shared.generate.options import GenerateConfig, as_in_generation

if TYPE_CHECKING:
    from shared.generate.models import NamedModels

_data = partial(flag, "data")
_metrics = partial(flag, "metrics")

_AS_IN_TRAINING = (
    "image_column",
    "conditioning_image_column",
    "caption_column",
    "allowed_data_dirs",
    "shards_image_key",
    "shards_conditioning_key",
    "shards_caption_key",
    "mismatched_pairs",
    "max_skipped_samples",
    "cache_dir",
    "seed",
)
MetricName = Literal["edges", "colours", "clip_score", "fid"]


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Everything that is asked of an evaluation. Attribute names are flag names; lists are tuples."""

    controlnet_model_name_or_path: tuple[str, ...] | None = as_in_generation("controlnet_model_name_or_path")
    controlnet_revision: tuple[str, ...] | None = as_in_generation("controlnet_revision")
    pretrained_model_name_or_path: str | None = as_in_generation("pretrained_model_name_or_path")
    pretrained_vae_model_name_or_path: str | None = as_in_generation("pretrained_vae_model_name_or_path")
    tokenizer_name: str | None = as_in_generation("tokenizer_name")
    revision: str | None = as_in_generation("revision")
    variant: str | None = as_in_generation("variant")
    cache_dir: str | None = as_in_generation("cache_dir")

    eval_data: tuple[str, ...] | None = _data(
        None,
        "The held-out pairs, read as a training reads them: a folder (metadata.jsonl or prompt.json), or WebDataset "
        "shards, which end in .tar.",
    )
    num_samples: int | None = _data(
        None, "How many of them to draw, the first in their order. Without it, all.", must_be=[at_least(1)]
    )
    image_column: str = as_in_training("image_column")
    conditioning_image_column: tuple[str, ...] = as_in_training("conditioning_image_column")
    caption_column: str = as_in_training("caption_column")
    allowed_data_dirs: tuple[str, ...] | None = as_in_training("allowed_data_dirs")
    shards_image_key: str | None = as_in_training("shards_image_key")
    shards_conditioning_key: tuple[str, ...] | None = as_in_training("shards_conditioning_key")
    shards_caption_key: str | None = as_in_training("shards_caption_key")
    conditioning_interpolation: InterpolationMode | None = _data(  # noqa: RUF009
        None,
        "The filter that resizes the condition images. Without it, that of the run's training, or else that of images.",
    )
    mismatched_pairs: MismatchedPairs = as_in_training("mismatched_pairs")  # noqa: RUF009
    max_skipped_samples: int = as_in_training("max_skipped_samples")

    conditioning_channels: tuple[int, ...] | None = as_in_generation("conditioning_channels")
    negative_prompt: str | None = as_in_generation("negative_prompt")
    num_images_per_prompt: int = as_in_generation("num_images_per_prompt")
    resolution: int | None = as_in_generation("resolution")
    height: int | None = as_in_generation("height")
    width: int | None = as_in_generation("width")

    seed: int = as_in_generation("seed")
    scheduler: Literal["unipc", "ddim", "euler", "dpmsolver++"] = as_in_generation("scheduler")
    num_inference_steps: int = as_in_generation("num_inference_steps")
    guidance_scale: float = as_in_generation("guidance_scale")
    controlnet_conditioning_scale: tuple[float, ...] = as_in_generation("controlnet_conditioning_scale")
    control_guidance_start: tuple[float, ...] = as_in_generation("control_guidance_start")
    control_guidance_end: tuple[float, ...] = as_in_generation("control_guidance_end")
    guess_mode: bool = as_in_generation("guess_mode")

    metrics: tuple[MetricName, ...] | None = _metrics(
        None,
        "What to measure: edges (are the condition's edges found again by Canny), colours (do coarse colours agree "
        "with the condition's), clip_score (does the picture follow its caption), fid (do pictures look like the "
        "held-out ones: FID and KID).",
    )
    clip_model_name_or_path: str = _metrics(
        "openai/clip-vit-base-patch16",
        "The CLIP model of clip_score, in safetensors: a folder in transformers' layout or a Hub repository. Scores of "
        "different models cannot be compared.",
    )
    inception_weights: str | None = _metrics(
        None,
        "The weights of fid: pt_inception-2015-12-05-6726825d.pth, which pytorch-fid and torch-fidelity use, at "
        "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights.",
    )
    metrics_batch_size: int = _metrics(
        16, "The number of pictures that the model of a metric sees at once.", must_be=[at_least(1), at_most(2**16)]
    )
    output_dir: str = _metrics(
        "evaluated",
        "The folder for pictures and figures: a new or an empty one, or that of the same evaluation, which then goes "
        "on: what is drawn or measured already is kept.",
    )

    batch_size: int = as_in_generation("batch_size")
    mixed_precision: Literal["no", "fp16", "bf16"] = as_in_generation("mixed_precision")
    enable_xformers_memory_efficient_attention: bool | None = as_in_generation(
        "enable_xformers_memory_efficient_attention"
    )
    allow_tf32: bool = as_in_generation("allow_tf32")
    ccache: str | None = as_in_generation("ccache")

    def generation(self) -> GenerateConfig:
        """What is asked of the pictures, without conditions and prompts."""
        names = {field.name for field in dataclasses.fields(GenerateConfig)}
        own = [field.name for field in dataclasses.fields(self)]
        return GenerateConfig(**{name: getattr(self, name) for name in own if name in names})

    def training(self, models: "NamedModels") -> TrainConfig:
        """The configuration of a training on the held-out data, with conditions as these models take them."""
        words, run = self.eval_data or (), models.controlnets[0].run
        trained = TrainConfig() if run is None else run.config
        named = {"train_shards": words} if names_shards(words) else {"train_data_dir": words[0]}
        return TrainConfig(
            **{name: getattr(self, name) for name in _AS_IN_TRAINING},
            **named,
            image_interpolation_mode=trained.image_interpolation_mode,
            conditioning_interpolation=self.conditioning_interpolation or trained.conditioning_interpolation,
            conditioning_channels=tuple(kind.channels for kind in models.conditions),
        )


EVALUATE_FLAGS: dict[str, Flag] = flags_of(EvaluateConfig)


def names_shards(words: Sequence[str]) -> bool:
    """Whether these are shards, and no folder. What an address has to say to its server comes after a `?`."""
    return any(word.partition("?")[0].endswith(".tar") for word in words)
