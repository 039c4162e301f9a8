"""`caption`: shards of images, and of their conditions where there are any, with captions that a model writes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from shared.config import TrainConfig
from shared.data.preprocessing import decode
from shared.data.sample import NO_CAPTIONS, RawSample
from shared.data.sources import open_source
from shared.data.sources.shard_keys import shard_keys
from shared.prepare_data.annotating import check_shape
from shared.prepare_data.conditions import Pixels
from shared.prepare_data.members import CONDITIONS, IMAGES, Members, caption_member, members_of
from shared.prepare_data.options import CaptionOptions
from shared.prepare_data.packing import CIRCLES_SIDE, in_batches, output_folder, pack, storing_of


class Captioner(NamedTuple):
    """A model that writes captions.

    Attributes:
        prepare: what `caption` needs of an image, uint8 [H,W,C]; from several threads. It raises BadSampleError for
            one that the model cannot look at.
        caption: the captions of prepared images.
    """

    prepare: Callable[[Pixels], Any]
    caption: Callable[[Sequence[Any]], Sequence[str]]


class _Prepared(NamedTuple):
    pictures: Members
    for_captioner: Any


def run_with_model(options: CaptionOptions, open_captioner: Callable[[], Captioner]) -> int:
    """Pack with captions made, or go on where an earlier call of it was.

    Args:
        open_captioner: called when the data are known to be there.

    Raises:
        UserError: as `pack`.
    """
    path = output_folder(options)
    training = _training(options)
    storing, settings = storing_of(options, training)
    source, captioner = open_source(training), open_captioner()

    def open_sample(number: int, sample: RawSample) -> _Prepared:
        pictures = members_of(replace(sample, captions=("",)), storing)  # which is about to be made
        has_conditions = sample.image not in sample.conditioning_images
        kept = {
            name: content
            for name, content in pictures.items()
            if name.startswith(IMAGES) or (has_conditions and name.startswith(CONDITIONS))
        }
        image_HWC = np.asarray(decode(next(kept[name] for name in kept if name.startswith(IMAGES))))
        check_shape(image_HWC)
        return _Prepared(kept, captioner.prepare(image_HWC))

    def finish(prepared: Sequence[_Prepared]) -> list[Members]:
        captions = captioner.caption([one.for_captioner for one in prepared])
        return [one.pictures | caption_member((text,)) for one, text in zip(prepared, captions, strict=True)]

    settings["captioner_model"] = options.captioner_model
    packing = in_batches(open_sample, finish, options.batch_size)
    exit_code = pack(path, source, options, packing, settings, training.num_conditions)
    if storing.resized is not None:
        storing.resized.report()
    return exit_code


def _training(options: CaptionOptions) -> TrainConfig:
    """The data as a training would read them; the image itself stands where there is no condition."""
    conditioning_keys = caption_key = None
    if options.train_shards is not None:
        keys = shard_keys(options.shards_image_key, options.shards_conditioning_key, NO_CAPTIONS)
        conditioning_keys = tuple(";".join((*choice, *keys.image)) for choice in keys.conditioning_images)
        caption_key = NO_CAPTIONS
    return options.training(
        resolution=options.resolution or CIRCLES_SIDE,
        shards_conditioning_key=conditioning_keys,
        caption_column=NO_CAPTIONS,
        shards_caption_key=caption_key,
    )
