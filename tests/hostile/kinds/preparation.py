"""`python3 -m shared.prepare_data` with the data of kind `data`; stand-ins for models encode what `cache` makes."""

import io
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import cv2  # noqa: F401 (in the warm process, for its children)

from shared.config import TrainConfig
from shared.config.demo import BASE_MODEL
from shared.data.sources import RandomAccessSource, open_source
from shared.prepare_data import annotating, checking, indexing, packing, showing  # noqa: F401 (as cv2)
from shared.prepare_data.cache.command import cache_by_command
from shared.prepare_data.command import SUBCOMMANDS, main
from shared.prepare_data.options import ComputedCondition
from tests.hostile.case import Case
from tests.hostile.kinds.data import HostileData, hostile_data
from tests.hostile.mutations.values import pick
from tests.hostile.outcome import Outcome, Sign
from tests.hostile.signs import is_private_picture, signs_in_files
from tests.hostile.watched import Attempt
from tests.shared.data.shard_corruptions import open_stand_ins

_SUBCOMMANDS = ("pack", "annotate", "cache", "check", "show", "index")
_FOUND_SOMETHING = 1  # `check`'s exit code


def build(case: Case) -> Attempt:
    """A subcommand with flags of chance."""
    data = hostile_data(case)
    name = pick(case, _SUBCOMMANDS)
    if name == "index" and not _are_plain_shards(data):
        name = "pack"
    words = _words(case, name, data)
    return Attempt(
        f"{name}: {data.what}",
        partial(_run, words, data, case),
        lambda: () if data.may_show else _signs(case),
        good_codes=frozenset({0, _FOUND_SOMETHING} if name == "check" else {0}),
        is_honest=data.is_honest,
        private=data.private,
    )


def _are_plain_shards(data: HostileData) -> bool:
    """Those that can be indexed."""
    return all(shard.endswith(".tar") for shard in data.values.get("train_shards", (".",)))


def _words(case: Case, name: str, data: HostileData) -> list[str]:
    if name == "cache":
        return _words_of_cache(case, data)
    if name == "index":
        return [name, *data.values["train_shards"], "--num_workers", str(pick(case, (0, 2)))]
    flags = SUBCOMMANDS[name].flags
    values: dict[str, Any] = data.values | {"cache_dir": str(case.folder / "cache"), "seed": case.below(100)}
    values |= {
        "num_workers": pick(case, (0, 2)),
        "max_skipped_samples": pick(case, (0, 2, 100)),
        "samples_per_shard": pick(case, (1, 4, 1000)),
        "condition": pick(case, get_args(ComputedCondition)),
        "output_dir": str(case.out / "shards"),
        "output_file": str(case.out / "sheet.png"),
        "report": str(case.out / "report.json"),
    }
    if case.chance(0.5):
        values |= {"resolution": 32, "mismatched_pairs": "crop"}  # honest pictures are of several shapes
    return [name, *(word for flag in values.keys() & flags.keys() for word in _flag(flag, values[flag]))]


def _words_of_cache(case: Case, data: HostileData) -> list[str]:
    """The flags of a training."""
    values: dict[str, Any] = data.values | {
        "cache_dir": str(case.folder / "cache"),
        "pretrained_model_name_or_path": str(BASE_MODEL),
        "resolution": 32,
        "mismatched_pairs": "crop",
        "max_skipped_samples": pick(case, (0, 2, 100)),
        "dataloader_num_workers": pick(case, (0, 2)),
        "output_dir": str(case.out / "cached"),
    }
    values.pop("num_evaluation_samples", None)
    return ["cache", *(word for flag, value in values.items() for word in _flag(flag, value))]


def _flag(name: str, value: Any) -> list[str]:
    match value:
        case None | False:
            return []
        case True:
            return [f"--{name}"]
        case tuple():
            return [f"--{name}", *value]
        case _:
            return [f"--{name}={value}"]


def _run(words: list[str], data: HostileData, case: Case) -> int:
    if words[0] == "cache":
        return cache_by_command(words[1:], "torch", open_stand_ins)
    code = main(words)
    if code == 0 and words[0] in ("pack", "annotate"):
        _check_counts(case, data)
    return code


def _check_counts(case: Case, data: HostileData) -> None:
    """Every sample is in the shards, or named among those that were left out."""
    source = open_source(
        TrainConfig(**data.values | {"num_evaluation_samples": 0, "cache_dir": str(case.folder / "cache")})
    )
    if isinstance(source, RandomAccessSource):
        card = json.loads((case.out / "shards" / "packed.json").read_text())
        assert card["samples"] + len(card["left_out"]) == len(source), "samples are lost"


def _signs(case: Case) -> Iterator[Sign]:
    yield from signs_in_files(case, case.out)
    for path in case.out.rglob("*.tar"):
        yield from _signs_in_shard(path)


def _signs_in_shard(path: Path) -> Iterator[Sign]:
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            content = tar.extractfile(member) or io.BytesIO()
            if is_private_picture(content.read()):
                yield Sign(Outcome.LEAKED, f"{path.name} holds a picture from outside of the data's folder")
