"""What a damaged, foreign or forged index of shards does: `python3 -m tests.shared.data.index_corruptions --cases N`.

Every case is one of three ends: a sentence that says what to do, the very samples that there are, or, where the digests
of what was changed are made right again, samples that are named and read within their shards.
"""

import argparse
import hashlib
import io
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from shared.data.sample import RawSample
from shared.data.sources.shard_index import PREFIX, SUFFIX, record_of
from shared.data.sources.shard_keys import ShardKeys, shard_keys
from shared.data.sources.shards import ShardSource
from shared.prepare_data.indexing import index_shards
from shared.user_errors import UserError
from tests.shared.data.pictures import pairs, write_tars

KEYS = shard_keys(None, None, None)
ADVICE = ("Delete it, or make it again", "Index it again", "shorter since")

_NUMBERS = (-1, 0, 1, 255, 2**31, 2**32, 2**63, 2**64, 10**30, 1e9, None, True, "9", [], {})


def indexed_shards(folder: Path, keys: ShardKeys) -> list[Path]:
    """Two shards of five small samples, and their index."""
    write_tars(folder, pairs(5), per_shard=3)
    shards = sorted(folder.glob("*.tar"))
    index_shards(shards, keys, 0)
    return shards


def run_cases(folder: Path, numbers: range, keys: ShardKeys = KEYS) -> dict[str, int]:
    """How many cases ended how. AssertionError, or whatever the reader lets through, for another end."""
    shards = indexed_shards(folder, keys)
    path = shards[0].with_name(shards[0].name + SUFFIX)
    honest = path.read_bytes()
    samples = _all(shards, keys)
    assert not isinstance(samples, str)
    ends: dict[str, int] = {}
    for number in numbers:
        rng = np.random.default_rng(number)
        signed = number % 2 == 0
        path.write_bytes(forged(rng, honest, len(keys.columns)) if signed else damaged(rng, honest))
        found = _all(shards, keys)
        if isinstance(found, str):
            assert signed or any(advice in found for advice in ADVICE), (number, found)
            end = "refused"
        else:
            end = "as it was" if found == samples else "other samples"
            assert signed or found == samples, number
            parts = [part for sample in found for part in (sample.image, *sample.conditioning_images)]
            contents = b"".join(shard.read_bytes() for shard in shards)
            assert all(part is None or bytes(part) in contents for part in parts), number  # type: ignore[arg-type]
        ends[end] = ends.get(end, 0) + 1
    return ends


def _all(shards: list[Path], keys: ShardKeys) -> list[RawSample] | str:
    """The samples, or the sentence that refuses them."""
    try:
        source = ShardSource(shards, keys)
        assert len(source) <= 100_000
        return [source[number] for number in range(len(source))]
    except UserError as error:
        return str(error)


def damaged(rng: np.random.Generator, content: bytes) -> bytes:
    """A region overwritten, cut, doubled or flipped, or another file in its place."""
    begin = int(rng.integers(len(content)))
    if rng.random() < 0.4:
        begin = int(rng.integers(64))
    end = min(len(content), begin + int(rng.choice((1, 2, 4, 8, 57, 512, len(content)))))
    noise = rng.integers(0, 256, end - begin, np.uint8).tobytes()
    match int(rng.integers(7)):
        case 0:
            return content[:begin] + noise + content[end:]
        case 1:
            return content[:begin]
        case 2:
            return content[:begin] + content[end:]
        case 3:
            return content[:end] + content[begin:]
        case 4:
            return content[:begin] + bytes([content[begin] ^ 1 << int(rng.integers(8))]) + content[begin + 1 :]
        case 5:
            return content[:begin] + rng.choice((b"\0", b"\xff")) * (end - begin) + content[end:]
        case _:
            foreign = io.BytesIO()
            np.save(foreign, np.array([{"a": 1}], object), allow_pickle=True)
            kinds = (b"", pickle.dumps(print), foreign.getvalue(), b"[]" * 50, b"\x1f\x8b\x08" + noise, noise)
            return kinds[int(rng.integers(len(kinds)))]


def forged(rng: np.random.Generator, content: bytes, parts: int) -> bytes:
    """Something else in the description or the records, with digests that are right for it."""
    length = PREFIX.unpack_from(content)[2]
    description = json.loads(content[PREFIX.size : PREFIX.size + length])
    body = bytearray(content[PREFIX.size + length :])
    if rng.random() < 0.5:
        size = record_of(parts).size
        place = int(rng.integers(5)) * size + int(rng.integers(size))
        body[place] = int(rng.choice((0, 1, 2, 127, 255)))
    else:
        _change(rng, description)
    if isinstance(description, dict):
        description["sha256"] = hashlib.sha256(body).hexdigest()
    text = json.dumps(description).encode()
    prefix = PREFIX.pack(*PREFIX.unpack_from(content)[:2], len(text), hashlib.sha256(text).digest())
    return prefix + text + body


def _change(rng: np.random.Generator, description: dict[str, Any]) -> None:
    """One value of the description, at any depth."""
    holder: Any = description
    key: Any = rng.choice(list(holder))
    while isinstance(holder[key], list | dict) and holder[key] and rng.random() < 0.8:
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else int(rng.integers(len(holder)))
    if rng.random() < 0.2:
        del holder[key]
    elif isinstance(holder[key], str):
        holder[key] = rng.choice(
            ["", ".", "..", "../x.tar", "/etc/passwd", "\0", "\ud800", "a" * 5000, "train-001.tar"]
        )
    elif isinstance(holder[key], int) and rng.random() < 0.6:
        holder[key] += int(rng.integers(-3, 4))
    else:
        holder[key] = _NUMBERS[int(rng.integers(len(_NUMBERS)))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(run_cases(Path(temporary), range(arguments.first, arguments.first + arguments.cases)))
