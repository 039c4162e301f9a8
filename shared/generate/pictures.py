"""Drawing what is asked for, part by part, and writing it down as it is made."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from shared.config import Backend
from shared.config.public import public_values
from shared.generate.options import GENERATE_FLAGS
from shared.generate.output_folder import CONTACT_SHEET, ContactSheet, begin_output, write_picture, write_record
from shared.generate.preparation import Commission, Job
from shared.generate.requests import Request
from shared.outgoing.redaction import masked, redacted
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

Draw = Callable[[list[str], np.ndarray, list[int]], np.ndarray]
"""(prompts, conditions uint8 [R,H,W,N], numbers of the pictures) → uint8 [R,H,W,3]."""


@dataclass(frozen=True)
class Artist:
    """A backend with its models on its devices."""

    backend: Backend
    devices: str
    draw: Draw
    at_once: int


def does_not_fit(job: Commission) -> UserError:
    """What to say where a device's memory was too small."""
    size = f"{job.drawing.width}x{job.drawing.height} pixels"
    advice = [f"a --batch_size below {job.config.batch_size}"] if job.config.batch_size > 1 else []
    advice += ["--mixed_precision bf16"] if job.config.mixed_precision == "no" else []
    return UserError(
        f"The models, and the pictures of {size} that are drawn at once (--batch_size {job.config.batch_size}), do not "
        f"fit into the device's memory: give {' or '.join([*advice, 'a smaller size'])}."
    )


def generate(job: Job, artist: Artist) -> Path:
    """Draw and write all pictures; returns their folder.

    Raises:
        UserError: a file cannot be written, or the devices' memory is too small.
    """
    folder = Path(job.config.output_dir)
    record = _record(job, artist)
    pictures = [_picture(job, request) for request in job.requests]
    begin_output(folder, record, pictures)
    logger.info(
        "Drawing %d pictures of %d × %d pixels on %s, %d at once; the first take longer",
        *(len(pictures), job.drawing.width, job.drawing.height, artist.devices, artist.at_once),
    )
    channels = [kind.channels for kind in job.models.conditions]
    sheet = ContactSheet(job.config.num_images_per_prompt, channels)
    with logging_redirect_tqdm(), tqdm(total=len(job.requests), unit="picture", dynamic_ncols=True) as bar:
        for start in range(0, len(job.requests), artist.at_once):
            part = job.requests[start : start + artist.at_once]
            drawn_RHWC = artist.draw(
                [request.prompt for request in part],
                job.conditions_GHWN[[request.condition for request in part]],
                [request.number for request in part],
            )
            for request, image_HWC in zip(part, drawn_RHWC, strict=True):
                texts = _texts(record, pictures[request.number])
                write_picture(folder / request.file_name, image_HWC, texts)
                conditions_HWN = job.conditions_GHWN[request.condition]
                sheet.add(request.number, job.headings[request.number], request.file_name, conditions_HWN, image_HWC)
            bar.update(len(part))
    sheet.write(folder)
    write_record(folder, record, pictures, finished=True)
    logger.info("%d pictures are in %s, side by side in %s", len(job.requests), shown(folder), CONTACT_SHEET)
    return folder


def _record(job: Job, artist: Artist) -> dict[str, Any]:
    """What all pictures have in common, without what addresses hold of secrets."""
    settings = public_values(job.config, GENERATE_FLAGS)
    resolved = {
        "base_model": redacted(str(job.models.config.pretrained_model_name_or_path)),
        "height": job.drawing.height,
        "width": job.drawing.width,
    }
    return {"backend": artist.backend, "devices": artist.devices, "settings": settings, **resolved}


def _picture(job: Job, request: Request) -> dict[str, Any]:
    conditions = [redacted(str(path)) for path in job.condition_files[request.condition]]
    return {
        "file": request.file_name,
        "number": request.number,
        "seed": job.config.seed,
        "prompt": masked(request.prompt),
        "conditioning_image": conditions[0] if len(conditions) == 1 else conditions,
    }


def _texts(record: dict[str, Any], picture: dict[str, Any]) -> dict[str, str]:
    """The metadata of a PNG: the prompt, and everything else as JSON."""
    settings = {name: value for name, value in record["settings"].items() if name not in ("prompt", "output_dir")}
    whole = record | {"settings": settings} | {name: picture[name] for name in ("number", "seed", "conditioning_image")}
    return {"prompt": picture["prompt"], "generation": json.dumps(whole, ensure_ascii=False)}
