"""Drawing what is missing, part by part."""

import logging
from collections.abc import Callable

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from shared.evaluate.preparation import Evaluation
from shared.generate.pictures import Artist
from shared.generate.preparation import Commission

logger = logging.getLogger(__name__)


def draw_missing(evaluation: Evaluation, make_artist: Callable[[Commission], Artist]) -> None:
    """Draw and write the pictures that are not there yet.

    Raises:
        UserError: a picture cannot be written, or the devices' memory is too small.
    """
    missing, total = evaluation.missing, len(evaluation.requests)
    if not missing:
        logger.info("All %d pictures are drawn already", total)
        return
    artist = make_artist(evaluation.commission(missing))
    logger.info(
        "Drawing %d of %d pictures of %d × %d pixels on %s, %d at once; the first take longer",
        *(len(missing), total, evaluation.drawing.width, evaluation.drawing.height, artist.devices, artist.at_once),
    )
    with logging_redirect_tqdm(), tqdm(total=total, initial=total - len(missing), unit="picture") as bar:
        for start in range(0, len(missing), artist.at_once):
            part = missing[start : start + artist.at_once]
            drawn_RHWC = artist.draw(
                [request.prompt for request in part],
                np.stack([evaluation.samples[request.condition].condition_HWN for request in part]),
                [request.number for request in part],
            )
            for request, image_HWC in zip(part, drawn_RHWC, strict=True):
                evaluation.folder.write_picture(request.number, image_HWC, request.prompt)
            bar.update(len(part))
