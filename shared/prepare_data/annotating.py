"""`annotate`: shards of images and captions, with conditions that are made of the images."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

from shared.config import TrainConfig
from shared.data.sample import BadSampleError, RawSample
from shared.data.sources import open_source
from shared.data.sources.shard_keys import shard_keys
from shared.prepare_data.conditions import Pixels, check_available, make_condition
from shared.prepare_data.members import CONDITION, Members, StoredImage, caption_member, png, stored_image
from shared.prepare_data.options import (
    DEFAULT_ANNOTATORS,
    USUAL_ROWS,
    AnnotateOptions,
    ComputedCondition,
    ConditionName,
)
from shared.prepare_data.packing import CIRCLES_SIDE, in_batches, one_by_one, output_folder, pack
from shared.randomness import Purpose, generator
from shared.user_errors import UserError

_LONGEST_BY_SHORTEST = 16  # side: models enlarge the shorter one to what they were trained on


class Annotator(NamedTuple):
    """A model that makes conditions.

    Attributes:
        prepare: what `annotate` needs of an image, uint8 [H,W,C]; from several threads. It raises BadSampleError for
            one of which no condition can be made.
        annotate: the conditions of prepared images, uint8, each [H,W] or [H,W,C] of its image's height and width.
    """

    prepare: Callable[[Pixels], Any]
    annotate: Callable[[Sequence[Any]], Sequence[Pixels]]


class _Prepared(NamedTuple):
    image: Members
    captions: tuple[str, ...]
    for_annotator: Any


def run(options: AnnotateOptions) -> int:
    """Pack with conditions made by arithmetic, or go on where an earlier call of it was."""
    condition = next((name for name in get_args(ComputedCondition) if name == options.condition), None)
    if condition is None:
        raise UserError(f"--condition is missing: name one of {', '.join(get_args(ConditionName))}.")
    for flag in ("annotator_model", "batch_size"):
        if getattr(options, flag) is not None:
            names = ", ".join(DEFAULT_ANNOTATORS)
            raise UserError(f"--{flag} is about conditions that a model makes ({names}): leave it out.")
    path = output_folder(options)
    check_available(condition)
    source, seed = open_source(_training(options)), options.seed

    def members(number: int, sample: RawSample) -> Members:
        stored, rng = _image_of(sample, options), generator(seed, Purpose.CONDITION, number)
        made = png(make_condition(condition, stored.pixels_HWC, rng))
        return stored.members | {CONDITION: made} | caption_member(sample.captions)

    return pack(path, source, options, one_by_one(members), {"condition": condition, "seed": seed})


def run_with_model(options: AnnotateOptions, model: str, open_annotator: Callable[[], Annotator]) -> int:
    """Pack with conditions that a model makes, or go on where an earlier call of it was.

    Args:
        model: what the user calls it.
        open_annotator: called when the data are known to be there.

    Raises:
        UserError: as `pack`.
    """
    path = output_folder(options)
    source = open_source(_training(options))
    annotator = open_annotator()

    def open_sample(number: int, sample: RawSample) -> _Prepared:
        stored = _image_of(sample, options)
        check_shape(stored.pixels_HWC)
        return _Prepared(stored.members, sample.captions, annotator.prepare(stored.pixels_HWC))

    def finish(prepared: Sequence[_Prepared]) -> list[Members]:
        conditions = annotator.annotate([one.for_annotator for one in prepared])
        return [
            one.image | {CONDITION: png(condition)} | caption_member(one.captions)
            for one, condition in zip(prepared, conditions, strict=True)
        ]

    settings = {"condition": options.condition, "annotator_model": model}
    packing = in_batches(open_sample, finish, options.batch_size or USUAL_ROWS)
    return pack(path, source, options, packing, settings)


def check_shape(image_HWC: Pixels) -> None:
    """Raises BadSampleError for a strip that is too long for any model."""
    shorter, longer = sorted(image_HWC.shape[:2])
    if longer > _LONGEST_BY_SHORTEST * shorter:
        raise BadSampleError(
            f"its image is {longer} × {shorter} pixels, more than {_LONGEST_BY_SHORTEST} times as long as wide, which "
            "no model is made for"
        )


def _image_of(sample: RawSample, options: AnnotateOptions) -> StoredImage:
    """Raises BadSampleError where image or caption is missing or cannot be read."""
    replace(sample, conditioning_images=(b"",)).check()  # which is about to be made
    return stored_image(sample.picture, options)


def _training(options: AnnotateOptions) -> TrainConfig:
    """The data as a training would read them whose conditions are the images themselves."""
    image_keys = shard_keys(options.shards_image_key, None, None).image
    return options.training(
        resolution=options.resolution or CIRCLES_SIDE,
        conditioning_image_column=(options.image_column,),
        shards_conditioning_key=None if options.train_shards is None else (";".join(image_keys),),
    )
