"""`annotate`: shards of images and captions, with conditions that are made of the images."""

from dataclasses import replace
from typing import get_args

import numpy as np

from shared.config import TrainConfig
from shared.data.preprocessing import decode, preprocess
from shared.data.sample import RawSample
from shared.data.sources import open_source
from shared.data.sources.shard_keys import shard_keys
from shared.prepare_data.conditions import check_available, make_condition
from shared.prepare_data.members import CONDITION, Members, caption_member, image_as_it_is, image_member, png
from shared.prepare_data.options import AnnotateOptions, ConditionName, PackingOptions
from shared.prepare_data.packing import CIRCLES_SIDE, output_folder, pack
from shared.randomness import Purpose, generator
from shared.user_errors import UserError


def run(options: AnnotateOptions) -> int:
    """Pack with conditions made, or go on where an earlier call of it was."""
    condition = options.condition
    if condition is None:
        raise UserError(f"--condition is missing: name one of {', '.join(get_args(ConditionName))}.")
    path = output_folder(options)
    check_available(condition)
    source, seed = open_source(_training(options)), options.seed

    def members(number: int, sample: RawSample) -> Members:
        return annotated(sample, options, condition, generator(seed, Purpose.CONDITION, number))

    return pack(path, source, options, members, {"condition": condition, "seed": seed})


def annotated(
    sample: RawSample, options: PackingOptions, condition: ConditionName, rng: np.random.Generator
) -> Members:
    """A sample's image and captions, and what is made of the image as it is stored.

    Raises:
        BadSampleError: image or caption is missing or cannot be read.
    """
    replace(sample, conditioning_images=(b"",)).check()  # which is about to be made
    if options.resolution is None:
        image_HWC, image = np.asarray(decode(sample.picture)), image_as_it_is(sample.picture)
    else:
        image_HWC = preprocess(sample.picture, options.resolution, options.image_interpolation_mode)
        image = image_member(image_HWC, options.jpeg_quality)
    return image | {CONDITION: png(make_condition(condition, image_HWC, rng))} | caption_member(sample.captions)


def _training(options: AnnotateOptions) -> TrainConfig:
    """The data as a training would read them whose conditions are the images themselves."""
    image_keys = shard_keys(options.shards_image_key, None, None).image
    return options.training(
        resolution=options.resolution or CIRCLES_SIDE,
        conditioning_image_column=(options.image_column,),
        shards_conditioning_key=None if options.train_shards is None else (";".join(image_keys),),
    )
