"""An evaluation in the order of its execution: draw, measure, write the page."""

import logging
from collections.abc import Callable

from shared.evaluate.drawing import draw_missing
from shared.evaluate.measuring import measure, write_record
from shared.evaluate.output_folder import PAGE_FILE, RECORD_FILE
from shared.evaluate.preparation import Evaluation
from shared.generate.pictures import Artist
from shared.generate.preparation import Commission
from shared.untrusted import shown

logger = logging.getLogger(__name__)


def evaluate(evaluation: Evaluation, make_artist: Callable[[Commission], Artist]) -> None:
    """Leave pictures, figures and the page in the output folder, and say the figures in the log.

    Raises:
        UserError: a file cannot be written, a model cannot be loaded, or the devices' memory is too small.
    """
    write_record(evaluation, dict(evaluation.kept))
    draw_missing(evaluation, make_artist)
    found = measure(evaluation)
    from shared.evaluate.page import render  # here, so that drawing need not wait for matplotlib

    evaluation.folder.write_page(render(evaluation, found))
    for one in found.values():
        for name, figure in one.found.figures.items():
            error = f" ± {figure.standard_error:.2g}" if figure.standard_error is not None else ""
            logger.info("%s: %.4g%s", name, figure.value, error)
    logger.info(
        "The figures are in %s/%s, and with pictures in %s", shown(evaluation.folder.path), RECORD_FILE, PAGE_FILE
    )
