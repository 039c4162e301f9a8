"""`show`: a contact sheet of samples, conditions beside images, captions above."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from shared.data.conditions import numbered_conditions
from shared.data.preprocessing import preprocess
from shared.data.sample import BadSampleError, RawSample
from shared.data.sources import RandomAccessSource, Source, open_source
from shared.data.sources.base import train_subset
from shared.evaluation.image_grid import GridRow, save_grid
from shared.prepare_data.numbered import numbered
from shared.prepare_data.options import ShowOptions
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)


def run(options: ShowOptions) -> int:
    """Draw the sheet; bad samples are left out of it, and named."""
    training = options.training(resolution=options.resolution)
    source = open_source(training)
    rows = [row for sample in _chosen(source, options) if (row := _row(sample, options)) is not None]
    if not rows:
        raise UserError("None of the samples chosen can be used. Choose others with another --seed.")
    path = Path(options.output_file)
    try:
        save_grid(path, rows, (*numbered_conditions(training.num_conditions), "image"))
    except OSError as error:
        raise UserError(
            f"--output_file {shown(path)} cannot be written: {error.strerror}. Give a file in a folder that you may "
            "write to."
        ) from error
    logger.info("%s shows %d samples", shown(path), len(rows))
    return 0


def _chosen(source: Source, options: ShowOptions) -> Iterator[RawSample]:
    if isinstance(source, RandomAccessSource):
        source = train_subset(source, options.num_samples, options.seed)
    return (read() for _, read in islice(numbered(source), options.num_samples))


def _row(sample: RawSample, options: ShowOptions) -> GridRow | None:
    resolution, interpolation = options.resolution, options.image_interpolation_mode
    try:
        sample.check()
        pictures = [preprocess(one, resolution, interpolation) for one in (*sample.conditions, sample.picture)]
    except BadSampleError as error:
        logger.warning("%s is left out: %s", shown(sample.name), shown(error))
        return None
    return GridRow(" | ".join(sample.captions), [("", picture) for picture in pictures])
