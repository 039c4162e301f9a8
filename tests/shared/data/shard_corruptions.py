"""What damaged or forged shards and caches do: `python3 -m tests.shared.data.shard_corruptions --cases N`.

A case changes one file: a shard, with or without an index beside it; a shard of a cache, its index, its record, its
encoded captions. Then everything is read as a training reads it. What was not touched has to be what it was. What was
touched may be refused as a whole, in a sentence; or its samples are named as bad; or they hold other bytes of the same
file, where nothing could tell: a caption has no checksum. A sample that is just not there any more is none of these.
"""

import argparse
import dataclasses
import faulthandler
import logging
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.config import TrainConfig
from shared.config.demo import BASE_MODEL
from shared.data.cache_record import RECORD_FILE
from shared.data.decoded_pairs import PairDecoder
from shared.data.sample import BadSampleError, RawSample
from shared.data.sources import open_source
from shared.data.sources.base import RandomAccessSource
from shared.data.sources.shard_index import SUFFIX
from shared.data.sources.shard_keys import shard_keys
from shared.data.tokenization import EncodedText, PromptInputs, TokenIds
from shared.models.configs import CLIPTextConfig, read_config
from shared.models.source import ModelSource
from shared.precomputed_text.precomputing import ALONE, TEXT_FOLDER, TextEncoder, precompute_text
from shared.prepare_data.cache.encoders import EncodedImages, Encoders, ImageEncoder
from shared.prepare_data.cache.making import make_cache
from shared.prepare_data.indexing import index_shards
from shared.user_errors import UserError
from tests.shared.data.index_corruptions import damaged
from tests.shared.data.pictures import config, pairs, tokenize, write_tars

_PAIRS = 5
_SIDE = 32
_LATENTS = (_SIDE // 8, _SIDE // 8, 4)
_FEATURES = read_config(ModelSource(BASE_MODEL, "text_encoder").file(), CLIPTextConfig).hidden_size
_FORGED = (
    0.25  # of the cases of shards: a header says something else, and its checksum is right for it; as many: blocks
)
_SECONDS = 60  # of a case, which takes some milliseconds
_FORBIDDEN = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pickle.find_class"}


class Seen(NamedTuple):
    """A sample as a step sees it: arrays as their bytes. `arrays` is None of one that is named as bad."""

    key: str
    arrays: dict[str, bytes] | None
    captions: tuple[str, ...]


class Change(NamedTuple):
    """What a case did to a file."""

    path: Path
    honest: bytes
    content: bytes
    is_forged: bool

    def touches(self, begin: int, end: int) -> bool:
        """Whether the honest bytes from `begin` to `end` may have become others, or stand elsewhere."""
        first = _common_prefix(self.honest, self.content)
        if len(self.honest) != len(self.content):
            return end > first
        last = len(self.honest) - _common_prefix(self.honest[::-1], self.content[::-1])
        return end > first and begin < last

    def ends_before(self, begin: int) -> bool:
        """Whether what stands at `begin` went with the end of the file, of which nothing is left that could tell."""
        return len(self.honest) != len(self.content) or not self.content[begin:].strip(b"\0")


@dataclass(frozen=True)
class Target:
    """What is broken, and how it is read.

    Attributes:
        files: of which one is changed.
        read: everything, as a training does; UserError where that is refused.
        tells_of_loss: whether something beside a shard knows what is in it.
        has_checksums: whether arrays that are not named as bad have to be what they were.
    """

    name: str
    files: tuple[Path, ...]
    read: Callable[[], list[Seen]]
    tells_of_loss: bool
    has_checksums: bool = False


def run_cases(folder: Path, numbers: range) -> dict[str, Counter[str]]:
    """How many cases of each target ended how. AssertionError, or whatever the readers let through, for another end."""
    targets = list(_targets(folder))
    expected = [target.read() for target in targets]
    ends: dict[str, Counter[str]] = {target.name: Counter() for target in targets}
    for number in numbers:
        target, before = targets[number % len(targets)], expected[number % len(targets)]
        faulthandler.dump_traceback_later(_SECONDS, exit=True)
        change = _changed(np.random.default_rng(number), target)
        change.path.write_bytes(change.content)
        try:
            end = _end_of(target, before, change)
        except Exception as error:
            raise AssertionError(f"case {number}: {target.name}, {change.path.name}") from error
        finally:
            change.path.write_bytes(change.honest)
            faulthandler.cancel_dump_traceback_later()
        ends[target.name][end] += 1
    return ends


def _end_of(target: Target, before: list[Seen], change: Change) -> str:
    try:
        found = target.read()
    except UserError:
        return "refused"
    if found == before:
        return "as it was"
    places = _places(change)
    known = {seen.key: seen for seen in before}
    for key in known.keys() - {seen.key for seen in found}:
        assert not target.tells_of_loss, f"{key} is lost"
        assert change.is_forged or change.ends_before(places[key][0]), f"{key} is lost"
    for seen in found:
        is_touched = change.is_forged or seen.key not in places or change.touches(*places[seen.key])
        assert is_touched or seen == known[seen.key], f"{seen.key} is another"
        if target.has_checksums and seen.arrays is not None:
            for name in ("latent_mean", "latent_std"):
                original = known[seen.key].arrays
                assert original is not None
                assert seen.arrays[name] == original[name], f"{name} of {seen.key} are others"
    if any(seen.arrays is None for seen in found):
        return "named"
    return "other bytes" if len(found) >= len(before) else "fewer"


# --- what is broken --------------------------------------------------------------------------------------------------


def _targets(folder: Path) -> Iterator[Target]:
    plain, indexed, cache = (folder / name for name in ("plain", "indexed", "cache"))
    for shards in (plain, indexed):
        write_tars(shards, pairs(_PAIRS), per_shard=3)
    index_shards(sorted(indexed.glob("*.tar")), shard_keys(None, None, None), 0)
    write_cache(cache, f"{plain}/*.tar")
    of_cache = _of_cache(cached_data=str(cache))
    read = partial(_samples, of_cache)
    cached_shards = tuple(sorted(cache.glob("*.tar")))
    beside = (cache / RECORD_FILE, *sorted(cache.glob(f"*{SUFFIX}")))
    yield Target("shards", _tars(plain), partial(_samples, _of_shards(plain)), tells_of_loss=False)
    yield Target("indexed shards", _tars(indexed), partial(_samples, _of_shards(indexed)), tells_of_loss=True)
    yield Target("a cache's shards", cached_shards, read, tells_of_loss=True, has_checksums=True)
    yield Target("a cache's record and index", beside, read, tells_of_loss=True, has_checksums=True)
    texts = tuple(sorted((cache / TEXT_FOLDER).rglob("*.safetensors")))
    yield Target("a cache's captions", texts, partial(_encoded_captions, of_cache), tells_of_loss=True)


def write_cache(folder: Path, shards: str) -> None:
    """A cache of the demo's base model, which a stand-in for its VAE and text encoder has encoded."""
    make_cache(_of_cache(output_dir=str(folder), train_shards=(shards,)), "torch", open_stand_ins)


def _tars(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.glob("*.tar")))


def _of_shards(folder: Path) -> TrainConfig:
    return config(train_shards=(f"{folder}/*.tar",), mismatched_pairs="crop")


def _of_cache(**values: Any) -> TrainConfig:
    return config(pretrained_model_name_or_path=str(BASE_MODEL), resolution=_SIDE, mismatched_pairs="crop", **values)


def open_stand_ins(training: TrainConfig) -> Encoders:
    """In place of a backend's models, for images of 32 pixels a side."""
    training = dataclasses.replace(training, mixed_precision="no")
    return Encoders(training, _LATENTS, lambda: ImageEncoder(2, _encode_images), lambda: TextEncoder(4, _encode_texts))


def _encode_images(pixels_BRR3: npt.NDArray[Any]) -> EncodedImages:
    mean_BHWC = np.repeat(pixels_BRR3[:, ::8, ::8, :1].astype(np.float32), 4, axis=-1)
    return mean_BHWC, mean_BHWC + 1


def _encode_texts(token_ids: TokenIds) -> dict[str, npt.NDArray[Any]]:
    ids_BL = token_ids["input_ids"].astype(np.float32)
    return {"prompt_embeds": np.repeat(ids_BL[..., None], _FEATURES, axis=-1)}


# --- how it is read --------------------------------------------------------------------------------------------------


def _opened(training: TrainConfig) -> RandomAccessSource:
    source = open_source(training)
    assert isinstance(source, RandomAccessSource)
    assert len(source) <= 1000
    return source


def _samples(training: TrainConfig) -> list[Seen]:
    source, decode = _opened(training), PairDecoder(training)
    return [_seen(source[number], decode) for number in range(len(source))]


def _seen(sample: RawSample, decode: PairDecoder) -> Seen:
    key = sample.name.rpartition(":")[2]
    try:
        pair = decode(sample)
    except BadSampleError:
        return Seen(key, None, ())
    return Seen(key, {name: array.tobytes() for name, array in pair.arrays.items()}, sample.captions)


def encode_captions(training: TrainConfig, source: RandomAccessSource) -> EncodedText:
    """As a run's start does, which encodes anew what is damaged."""
    return precompute_text(
        training, "torch", [source], PromptInputs(tokenize), lambda: TextEncoder(4, _encode_texts), ALONE
    )


def _encoded_captions(training: TrainConfig) -> list[Seen]:
    source = _opened(training)
    texts = encode_captions(training, source)
    captions = [source.captions(number) for number in range(len(source))]
    arrays = [texts({"input_ids": tokenize(some)}) for some in captions]
    return [
        Seen(str(number), {name: array.tobytes() for name, array in made.items()}, captions[number])
        for number, made in enumerate(arrays)
    ]


# --- how it is broken ------------------------------------------------------------------------------------------------


def _changed(rng: np.random.Generator, target: Target) -> Change:
    path = target.files[int(rng.integers(len(target.files)))]
    honest = path.read_bytes()
    kind = rng.random() if path.suffix == ".tar" else 1
    if kind < _FORGED:
        return Change(path, honest, _forged(rng, honest), is_forged=True)
    if kind < 2 * _FORGED:
        content, is_forged = _in_blocks(rng, honest)
        return Change(path, honest, content, is_forged)
    return Change(path, honest, damaged(rng, honest), is_forged=False)


def _in_blocks(rng: np.random.Generator, tar: bytes) -> tuple[bytes, bool]:
    """Whole blocks of a tar cut, lost, doubled, or never written: zeros, as of a disk that was full. And whether it may
    pass for an honest one, because a block is a copy of another, a header perhaps."""
    size = tarfile.BLOCKSIZE
    begin = int(rng.integers(len(tar) // size)) * size
    end = begin + size * int(rng.integers(1, 9))
    other = int(rng.integers(len(tar) // size)) * size
    changed = (
        tar[:begin],
        tar[:begin] + tar[end:],
        tar[:end] + tar[begin:],
        tar[:begin] + bytes(len(tar[begin:end])) + tar[end:],
        tar[:begin] + bytes(len(tar) - begin),
        tar[:begin] + tar[other : other + size] + tar[begin + size :],
    )
    kind = int(rng.integers(len(changed)))
    return changed[kind], kind == len(changed) - 1


def _forged(rng: np.random.Generator, tar: bytes) -> bytes:
    """A header that says something else, with a checksum that is right for it (POSIX.1-2017, "ustar")."""
    headers = [begin for begin in range(0, len(tar), tarfile.BLOCKSIZE) if tar[begin + 257 : begin + 262] == b"ustar"]
    begin = headers[int(rng.integers(len(headers)))]
    header = bytearray(tar[begin : begin + tarfile.BLOCKSIZE])
    name, size, kind, prefix = slice(0, 100), slice(124, 136), slice(156, 157), slice(345, 500)
    sizes = (b"%011o\0" % value for value in (0, 1, 511, 513, len(tar), 8**11 - 1, int(rng.integers(5000))))
    values: tuple[tuple[slice, list[bytes]], ...] = (
        (
            name,
            [b"0001.text.txt", b"0000.image.png", b"../../etc/passwd", b"/etc/passwd", b"\xff\xfe", b".", b"a" * 100],
        ),
        (size, [*sizes, b"\xff" * 12, b"\x80" + b"\xff" * 11, b"-0000000001\0"]),
        (kind, [b"1", b"2", b"3", b"5", b"6", b"L", b"K", b"S", b"V", b"g", b"x", b"\0"]),
        (prefix, [b"..", b"/etc", b"0001", b"\xff" * 155]),
    )
    place, choices = values[int(rng.integers(len(values)))]
    header[place] = choices[int(rng.integers(len(choices)))].ljust(place.stop - place.start, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar[:begin] + bytes(header) + tar[begin + tarfile.BLOCKSIZE :]


def _places(change: Change) -> dict[str, tuple[int, int]]:
    """Of each sample of an honest shard, where its members begin and end."""
    places: dict[str, tuple[int, int]] = {}
    if change.path.suffix == ".tar":
        change.path.write_bytes(change.honest)
        with tarfile.open(change.path) as tar:
            for member in tar.getmembers():
                key, end = member.name.partition(".")[0], member.offset_data + member.size
                places[key] = (min(member.offset, places.get(key, (member.offset, 0))[0]), end)
    return places


def _common_prefix(one: bytes, other: bytes) -> int:
    length = min(len(one), len(other))
    differing = np.flatnonzero(np.frombuffer(one[:length], np.uint8) != np.frombuffer(other[:length], np.uint8))
    return int(differing[0]) if differing.size else length


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _FORBIDDEN:
        raise AssertionError(f"{event} {arguments!a}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    arguments = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as temporary:
        run_cases(Path(temporary) / "compiled", range(0))
        sys.addaudithook(_forbid)
        started = time.monotonic()
        ends = run_cases(Path(temporary) / "run", range(arguments.first, arguments.first + arguments.cases))
        seconds = time.monotonic() - started
    for target, counts in ends.items():
        print(f"{target}: " + ", ".join(f"{count:,} {end}" for end, count in counts.most_common()))
    print(f"{arguments.cases / seconds:,.0f} cases a second")


if __name__ == "__main__":
    main()
