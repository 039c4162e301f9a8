"""The flags of `python3 -m shared.prepare_data`, declared once. Those that name data are the training's own."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

from shared.config import TrainConfig
from shared.config.flags import at_least, at_most, flag, within
from shared.config.options import InterpolationMode, MismatchedPairs, as_in_training

_data = partial(flag, "data")
_model = partial(flag, "model")
_output = partial(flag, "output")
_work = partial(flag, "work")

_LARGEST_SIDE = 8192  # pixels, as in training
_MOST_THREADS = 1024
USUAL_ROWS, _MOST_ROWS = 8, 4096

ComputedCondition = Literal["canny", "grey", "blur", "palette", "tile", "inpaint"]
ModelCondition = Literal["depth", "segmentation", "pose", "soft_edges", "landmarks"]
ConditionName = Literal[ComputedCondition, ModelCondition]

DEFAULT_ANNOTATORS: dict[ModelCondition, str | None] = {
    "depth": "depth-anything/Depth-Anything-V2-Small-hf",
    "segmentation": "openmmlab/upernet-convnext-small",
    "pose": "lllyasviel/Annotators",
    "soft_edges": "lllyasviel/Annotators",
    "landmarks": None,  # dlib's points have no home on the Hub
}

_THREADS = "The number of threads. Without it, one for every processor, at most 16."
_ROWS = "The number of images that a model sees at once."
_SIDE = (at_least(8), at_most(_LARGEST_SIDE))


@dataclass(frozen=True)
class ImageOptions:
    """What names images, as in training. `resolution` is the subcommand's own: there it means something else."""

    dataset_name: str | None = as_in_training("dataset_name")
    dataset_config_name: str | None = as_in_training("dataset_config_name")
    train_data_dir: str | None = as_in_training("train_data_dir")
    load_from_disk: bool = as_in_training("load_from_disk")
    allowed_data_dirs: tuple[str, ...] | None = as_in_training("allowed_data_dirs")
    train_shards: tuple[str, ...] | None = as_in_training("train_shards")
    shards_image_key: str | None = as_in_training("shards_image_key")
    allow_shell_urls: bool = as_in_training("allow_shell_urls")
    generated_circles: int | None = as_in_training("generated_circles")
    image_column: str = as_in_training("image_column")
    max_train_samples: int | None = as_in_training("max_train_samples")
    streaming: bool = as_in_training("streaming")
    cache_dir: str | None = as_in_training("cache_dir")
    seed: int = as_in_training("seed")

    def training(self, **values: Any) -> TrainConfig:
        """The configuration of a training on these data; streams are read in their own order."""
        names = {field.name for field in fields(TrainConfig)} - {"resolution"}
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name in names}
        return TrainConfig(**(given | {"shuffle_buffer_size": 1} | values))


@dataclass(frozen=True)
class CaptionedOptions(ImageOptions):
    """What names images and captions."""

    shards_caption_key: str | None = as_in_training("shards_caption_key")
    caption_column: str = as_in_training("caption_column")


@dataclass(frozen=True)
class DataOptions(CaptionedOptions):
    """What names training pairs."""

    shards_conditioning_key: tuple[str, ...] | None = as_in_training("shards_conditioning_key")
    conditioning_image_column: tuple[str, ...] = as_in_training("conditioning_image_column")


@dataclass(frozen=True)
class IndexOptions:
    """Flags of `index`."""

    shards_image_key: str | None = as_in_training("shards_image_key")
    shards_conditioning_key: tuple[str, ...] | None = as_in_training("shards_conditioning_key")
    shards_caption_key: str | None = as_in_training("shards_caption_key")
    output_file: str | None = _output(
        None, "Where the index of remote shards is written to; that of local ones stands beside them."
    )
    num_workers: int | None = _work(None, _THREADS, must_be=[within(0, _MOST_THREADS)])


@dataclass(frozen=True)
class PackingOptions(ImageOptions):
    """Flags of whatever packs."""

    output_dir: str | None = _output(
        None, "The folder for the shards: a new or an empty one, or that of the same packing."
    )
    samples_per_shard: int = _output(
        1000, "The number of samples that a shard is made of.", must_be=[within(1, 1_000_000)]
    )
    resolution: int | None = _output(
        None,
        "Resize images and conditions so that the shorter side is this, and crop them at the centre, as a training at "
        "this --resolution does. Without it, they stay as they are (and circles are drawn at 512).",
        must_be=_SIDE,
    )
    image_interpolation_mode: InterpolationMode = as_in_training("image_interpolation_mode")  # noqa: RUF009
    jpeg_quality: int | None = _output(
        None,
        "Store resized images as JPEG of this quality, which takes much less space. Without it, as PNG, which keeps "
        "every pixel. Conditions are PNG in any case.",
        must_be=[within(1, 100)],
        only_with="resolution",
    )
    max_skipped_samples: int = as_in_training("max_skipped_samples")
    num_workers: int | None = _work(None, _THREADS, must_be=[within(0, _MOST_THREADS)])


@dataclass(frozen=True)
class PackingPairsOptions(PackingOptions):
    """Flags of whatever packs images with conditions that there are."""

    conditioning_interpolation: InterpolationMode | None = _output(  # noqa: RUF009
        None,
        "The filter that resizes the condition images: nearest for maps of labels. Without it, that of the images.",
        only_with="resolution",
    )
    mismatched_pairs: MismatchedPairs = _output(  # noqa: RUF009
        "skip",
        "What becomes of pairs whose image and condition are of different shapes, as in training: skip leaves them "
        "out, resize stretches the condition over the image, crop crops either by itself.",
        only_with="resolution",
    )


@dataclass(frozen=True)
class PackOptions(DataOptions, PackingPairsOptions):
    """Flags of `pack`."""


@dataclass(frozen=True)
class AnnotateOptions(CaptionedOptions, PackingOptions):
    """Flags of `annotate`."""

    condition: ConditionName | None = _output(  # noqa: RUF009 (a name for a Literal)
        None, "What to make of each image."
    )
    annotator_model: str | None = _model(
        None,
        "The model that makes it: a folder, or a name on the Hub; for landmarks, dlib's file of 68 points. Without it, "
        "the usual one: " + ", ".join(f"{name} {model}" for name, model in DEFAULT_ANNOTATORS.items() if model) + ".",
    )
    batch_size: int | None = _model(None, f"{_ROWS} Without it, {USUAL_ROWS}.", must_be=[within(1, _MOST_ROWS)])

    @property
    def model_condition(self) -> ModelCondition | None:
        """The condition, where it is a model that makes it."""
        return next((name for name in DEFAULT_ANNOTATORS if name == self.condition), None)


@dataclass(frozen=True)
class CaptionOptions(PackingPairsOptions):
    """Flags of `caption`."""

    shards_conditioning_key: tuple[str, ...] | None = as_in_training("shards_conditioning_key")
    conditioning_image_column: tuple[str, ...] | None = _data(
        None, "The columns of the condition images, to keep them. Without it, those of tars and of prompt.json are."
    )
    captioner_model: str = _model(
        "Salesforce/blip-image-captioning-base", "The BLIP model that looks: a folder, or a name on the Hub."
    )
    batch_size: int = _model(USUAL_ROWS, _ROWS, must_be=[within(1, _MOST_ROWS)])

    def training(self, **values: Any) -> TrainConfig:
        """As for all data; the image itself stands where no condition is named."""
        columns = self.conditioning_image_column or (self.image_column,)
        return super().training(**({"conditioning_image_column": columns} | values))


@dataclass(frozen=True)
class CacheOptions:
    """The flag of `cache` that is no training's."""

    backend: Literal["flax", "torch"] | None = _work(
        None, "What encodes. Without it, flax where it is installed, or else torch."
    )


@dataclass(frozen=True)
class CheckOptions(DataOptions):
    """Flags of `check`."""

    report: str | None = _output(None, "A file for the list, as JSON.")
    resolution: int = _work(
        512, "What the data are for: pictures of a shorter side than this are listed.", must_be=_SIDE
    )
    num_workers: int | None = _work(None, _THREADS, must_be=[within(0, _MOST_THREADS)])


@dataclass(frozen=True)
class ShowOptions(DataOptions):
    """Flags of `show`."""

    num_samples: int = _output(
        16, "The number of samples, chosen by --seed; of a stream, the first.", must_be=[within(1, 1000)]
    )
    resolution: int = _output(256, "The side of each picture, in pixels, cropped as in training.", must_be=_SIDE)
    image_interpolation_mode: InterpolationMode = as_in_training("image_interpolation_mode")  # noqa: RUF009
    output_file: str = _output("samples.png", "The contact sheet, a PNG file; one that is there is replaced.")
