"""The pictures that are asked for: each a prompt with a condition, and a number."""

from collections.abc import Sequence
from typing import NamedTuple

from shared.generate.options import GenerateConfig
from shared.untrusted import MIB, read_file, shown
from shared.untrusted.text import decoded
from shared.user_errors import UserError

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".ppm", ".avif", ".jp2")
_MOST_CONDITIONS = 1000  # they are held in memory: 3 GiB at 1024 px
_MOST_PICTURES = 10_000  # of one generation.json
_LARGEST_PROMPT_FILE = MIB


class Request(NamedTuple):
    """One picture. `number`, from 0, decides its noise; `condition` counts the groups of condition images."""

    number: int
    prompt: str
    condition: int

    @property
    def file_name(self) -> str:
        return f"{self.number:03}.png"


def prompts_of(config: GenerateConfig) -> list[str]:
    """Those of the command line, or of the file that it names.

    Raises:
        UserError: the file cannot be read, or holds none.
    """
    if config.prompt_file is None:
        return list(config.prompt or ())
    try:
        text = decoded(read_file(config.prompt_file, _LARGEST_PROMPT_FILE))
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt_file {shown(config.prompt_file)} is not UTF-8 at byte {error.start}. Write it in UTF-8."
        ) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--prompt_file {shown(config.prompt_file)} holds no prompt; expected one on each line.")
    return prompts


def pair(prompts: Sequence[str], conditions: int, images_per_prompt: int) -> list[Request]:
    """A request for every picture: each pair's pictures have numbers that follow each other.

    Raises:
        UserError: there are neither as many of one as of the other nor a single one of either, or too many.
    """
    if len(prompts) != conditions and 1 not in (len(prompts), conditions):
        raise UserError(
            f"There are {len(prompts)} prompts and {conditions} condition images: give as many of one as of the "
            "other, or a single one of either."
        )
    pairs = max(len(prompts), conditions)
    if pairs * images_per_prompt > _MOST_PICTURES:
        raise UserError(
            f"{pairs} pairs of prompt and condition with --num_images_per_prompt {images_per_prompt} are more than "
            f"{_MOST_PICTURES} pictures: ask for them in several parts, each with its own --output_dir."
        )
    return [
        Request(place * images_per_prompt + copy, prompts[place % len(prompts)], place % conditions)
        for place in range(pairs)
        for copy in range(images_per_prompt)
    ]
