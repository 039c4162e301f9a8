"""The held-out pairs: which of them are usable, and their pixels when they are asked for.

Axes: H height, W width of the pictures that are drawn, N channels of the conditions side by side.
"""

import logging
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from shared.config import TrainConfig
from shared.config.validation import check_sources
from shared.data.decoded_pairs import DecodedPair, PairDecoder
from shared.data.sample import BadSampleError, SkippedSamples
from shared.data.sources import Manifest, RandomAccessSource, open_source
from shared.data.views import Size
from shared.evaluate.options import EvaluateConfig, names_shards
from shared.generate.models import NamedModels
from shared.outgoing.redaction import redacted
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)


class HeldOutPair(NamedTuple):
    """What a picture is drawn for: `condition_HWN` and `truth_HWC` (RGB), uint8, 0 to 255."""

    condition_HWN: npt.NDArray[np.uint8]
    truth_HWC: npt.NDArray[np.uint8]
    caption: str


class HeldOutSamples:
    """The first usable samples of the data, in their order. Nothing of their pictures stays in memory.

    Attributes:
        manifest: of the data.
        captions: the first caption of each sample.
        skipped: how many on the way to them could not be used.
    """

    def __init__(self, source: RandomAccessSource, config: TrainConfig, size: Size, most: int | None) -> None:
        """Reads and decodes them once.

        Raises:
            UserError: there are none, or fewer than `most`, or more are bad than `max_skipped_samples` allows.
        """
        self._source, self._decode, self._size = source, PairDecoder(config), size
        self.manifest: Manifest = source.manifest
        self._indices: list[int] = []
        self.captions: list[str] = []
        skipped = SkippedSamples(config.max_skipped_samples)
        with (
            logging_redirect_tqdm(),
            tqdm(total=min(most or len(source), len(source)), unit="pair", dynamic_ncols=True) as bar,
        ):
            for index in range(len(source)):
                if len(self._indices) == most:
                    break
                candidate = source[index]
                try:
                    self._decoded(index)
                except BadSampleError as error:
                    skipped.add(candidate.name, error)
                    continue
                self._indices.append(index)
                self.captions.append(candidate.captions[0])
                bar.update()
        self._decode.report()
        self.skipped = len(skipped)
        if len(self._indices) < (most or 1):
            wanted = f"--num_samples is {most}, and " if most is not None else ""
            raise UserError(
                f"{wanted}--eval_data holds {len(self._indices)} usable pairs of {len(source)}: ask for fewer, or give "
                "other data."
            )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> HeldOutPair:
        try:
            pair = self._decoded(self._indices[place])
        except BadSampleError as error:
            raise UserError(
                f"Pair {place} of --eval_data could be read at first and cannot any more: {error}. Put it back."
            ) from error
        assert pair.pixels is not None, "no cache is read here"
        return HeldOutPair(pair.conditioning_pixels, pair.pixels, self.captions[place])

    def __iter__(self) -> Iterator[HeldOutPair]:
        return map(self.__getitem__, range(len(self)))

    def _decoded(self, index: int) -> DecodedPair:
        return self._decode(self._source[index], size=self._size)


def open_samples(config: EvaluateConfig, models: NamedModels, size: Size) -> HeldOutSamples:
    """The pairs that the flags name.

    Args:
        size: (width, height) of the pictures.

    Raises:
        UserError: there are no such data, they have another number of conditions than the ControlNets take, or too few
            of them can be used.
    """
    words = config.eval_data or ()
    if not names_shards(words):
        if len(words) > 1:
            raise UserError(
                f"--eval_data names {len(words)} places: give one folder, or shards, whose names end in .tar."
            )
        if not os.path.isdir(words[0]):
            raise UserError(
                f"--eval_data: there is no folder {shown(redacted(words[0]))}. Give a folder of pairs, as "
                "--train_data_dir takes it, or shards, whose names end in .tar."
            )
    data = config.training(models)
    if data.num_conditions != len(models.conditions):
        raise UserError(
            f"The samples have {data.num_conditions} condition images (--conditioning_image_column, "
            f"--shards_conditioning_key), and the ControlNets take {len(models.conditions)}: name as many."
        )
    check_sources(data)
    source = open_source(data)
    if not isinstance(source, RandomAccessSource):
        raise UserError(
            "--eval_data can only be read from front to back: give uncompressed shards on this machine, or remote ones "
            "with the index beside them that python3 -m shared.prepare_data index writes."
        )
    return HeldOutSamples(source, data, size, config.num_samples)
