"""How long a run waits for its data, and what it holds of them: shards with an index, of up to ten million samples.

    python3 -m benchmarks.indexed_start --samples 10000000 --folder FOLDER

The shards are holes of zeros, and the index is one of random places in them: what a start does has nothing to do with
pictures. A process of its own measures; the index is in the page cache, where it was just written. `--headers N`
measures a start without an index, on N samples in real tars.
"""

import argparse
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import webdataset

from shared.config import TrainConfig
from shared.data.candidates import ShuffledCandidates
from shared.data.sources import RandomAccessSource, open_source
from shared.data.sources.shard_index import SUFFIX, IndexedShard
from shared.data.sources.shard_index_writing import ShardContent, write_index
from shared.data.sources.shard_keys import shard_keys
from shared.data.sources.shard_layout import HEADER

_PER_SHARD = 10_000
_SIZE = 2**32  # of a shard, which is a hole in the disk
_KEY_LENGTH = 9
_POSITION = 1_000_000

_FIELDS = np.dtype(  # those of a record of one condition
    [
        ("offsets", "<u8", 3),
        ("sizes", "<u4", 3),
        ("headers", "<u4", 3),
        ("extensions", "u1", 3),
        ("key_begin", "<u4"),
        ("key_length", "<u2"),
    ]
)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--headers", type=int, help="samples in real tars, read without an index")
    parser.add_argument("--measure", action="store_true", help="one start, on what is in the folder")
    arguments = parser.parse_args(words)
    if arguments.measure:
        _measure(arguments.folder)
        return
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    if arguments.headers:
        _write_tars(arguments.folder, arguments.headers)
    else:
        _write_index(arguments.folder, arguments.samples)
    command = [sys.executable, "-m", "benchmarks.indexed_start", "--measure", "--folder", str(arguments.folder)]
    subprocess.run(command, check=True)


def _measure(folder: Path) -> None:
    before = _resident()
    began = time.perf_counter()
    source = open_source(TrainConfig(train_shards=(f"{folder}/*.tar",)))
    assert isinstance(source, RandomAccessSource)
    opened = time.perf_counter() - began
    held = _resident() - before
    began = time.perf_counter()
    candidates = ShuffledCandidates(source, 0)
    name = _name_at(candidates, min(_POSITION, len(source) - 1))
    found = time.perf_counter() - began
    began = time.perf_counter()
    for position in range(1000):
        _name_at(candidates, position)
    each = (time.perf_counter() - began) / 1000
    print(f"{len(source):,} samples, the one at position {_POSITION:,} is {name}")
    print(f"opened in {opened:.2f} s")
    print(f"sample {_POSITION:,} found in {1000 * found:.1f} ms, any other in {1e6 * each:.0f} us")
    print(f"peak of resident memory: {held / 2**20:.1f} MiB for the source, {held / len(source):.1f} bytes a sample")
    print(f"with its order, {(_resident() - before) / len(source):.1f} bytes a sample")


def _name_at(candidates: ShuffledCandidates, position: int) -> str:
    """Of the sample, which is read: its files, not its pictures."""
    return next(candidates.at(position)).name


def _resident() -> int:
    """The largest so far, in bytes. (That of `getrusage` begins with the parent's.)"""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _write_index(folder: Path, samples: int) -> None:
    rng = np.random.default_rng(0)
    contents = []
    for number, begin in enumerate(range(0, samples, _PER_SHARD)):
        count = min(_PER_SHARD, samples - begin)
        path = folder / f"{number:05d}.tar"
        with path.open("wb") as file:
            file.truncate(_SIZE)
        records = np.zeros(count, _FIELDS)
        records["offsets"] = rng.integers(1, 2**22, (count, 3)) * 512
        records["sizes"] = rng.integers(50_000, 150_000, (count, 3)) // (1, 4, 1000)
        records["headers"] = zlib.crc32(bytes(HEADER))
        records["key_begin"], records["key_length"] = np.arange(count) * _KEY_LENGTH, _KEY_LENGTH
        keys = "".join(f"{key:0{_KEY_LENGTH}d}" for key in range(begin, begin + count)).encode()
        shard = IndexedShard(path.name, _SIZE, 0, count, len(keys))
        contents.append(ShardContent(shard, records.tobytes(), keys))
    write_index(folder / f"00000.tar{SUFFIX}", shard_keys(None, None, None).columns, contents, "0" * 64)


def _write_tars(folder: Path, samples: int) -> None:
    for number, begin in enumerate(range(0, samples, _PER_SHARD)):
        with (folder / f"{number:05d}.tar").open("wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
            for key in range(begin, min(begin + _PER_SHARD, samples)):
                parts = {"image.jpg": b"I", "conditioning_image.png": b"C", "text.txt": b"T"}
                writer.write({"__key__": f"{key:0{_KEY_LENGTH}d}", **parts})


if __name__ == "__main__":
    main(sys.argv[1:])
