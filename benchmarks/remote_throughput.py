"""Training pairs per second from remote shards, beside those from the same shards on the local disk.

    python3 -m benchmarks.remote_throughput --folder FOLDER [--latency 0.02] [--threads 2] [--seconds 10] [--json FILE]

By turns, 8 pairs per batch: a local tar; an HTTP server with ranges and moto's S3, both on this machine in processes of
their own (which take of the same processors), every answer after --latency seconds; from either as a stream and, with
an index, in any order. The tar counts as --repeated shards, so that an epoch is long.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import s3fs
from transformers import CLIPTokenizer

from benchmarks.data_throughput import CASES, our_rate, write_data
from benchmarks.photo_folder import write_tar
from shared.config import TrainConfig
from shared.config.demo import BASE_MODEL
from shared.data.sources.shard_index import SUFFIX
from shared.data.sources.shard_keys import shard_keys
from shared.prepare_data.indexing import index_shards

_LOCAL = "local tar"
_STREAMED, _INDEXED = "streamed", "indexed"
_TAR = "samples.tar"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the data; what is there already is used again")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["photos", "prepared"])
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before every answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=64, help="of each case")
    parser.add_argument("--repeated", type=int, default=32, help="shards, all of them the same tar")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    figures = {case: measure(serve_data(write_data(case, arguments)), arguments) for case in arguments.cases}
    print(report(figures))
    if arguments.json:
        written = {"processors": os.cpu_count(), "latency": arguments.latency, "pairs_per_second": figures}
        arguments.json.write_text(json.dumps(written), encoding="utf-8")


def serve_data(folder: Path) -> Path:
    """A folder with the tar twice: alone, and with an index beside it."""
    served = folder / "served"
    for name in (_STREAMED, _INDEXED):
        (served / name).mkdir(parents=True, exist_ok=True)
        if not (served / name / _TAR).exists():
            os.link(write_tar(folder), served / name / _TAR)
    index_shards([served / _INDEXED / _TAR], shard_keys(None, None, None), 0)
    return served


def measure(served: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Pairs per second of every side, the median of all rounds, in which they follow each other."""
    tokenizer = CLIPTokenizer.from_pretrained(BASE_MODEL, subfolder="tokenizer")
    common = TrainConfig(
        resolution=arguments.resolution, dataloader_num_workers=arguments.threads, seed=0, shuffle_buffer_size=64
    )
    with ExitStack() as stack:
        http = stack.enter_context(server("http", arguments.latency, "--folder", str(served)))
        os.environ |= {
            "AWS_ENDPOINT_URL": stack.enter_context(server("s3", arguments.latency)),
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        fill_bucket(served)
        places = {_LOCAL: str(served / _INDEXED)}
        for name in (_STREAMED, _INDEXED):
            places |= {f"HTTP, {name}": f"{http}/{name}", f"S3, {name}": f"s3://benchmark/{name}"}
        rates: dict[str, list[float]] = {side: [] for side in places}
        for _ in range(arguments.rounds):
            for side, place in places.items():
                config = replace(common, train_shards=(f"{place}/{_TAR}",) * arguments.repeated)
                rates[side].append(our_rate(config, tokenizer, arguments.seconds))
    return {side: statistics.median(values) for side, values in rates.items()}


@contextmanager
def server(kind: str, latency: float, *words: str) -> Iterator[str]:
    """The address of one, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.remote_servers", kind, "--latency", str(latency), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()


def fill_bucket(served: Path) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    file_system = s3fs.S3FileSystem()
    file_system.mkdir("benchmark")
    for name in (_STREAMED, _INDEXED):
        file_system.pipe_file(f"benchmark/{name}/{_TAR}", (served / name / _TAR).read_bytes())
    index = served / _INDEXED / f"{_TAR}{SUFFIX}"
    file_system.pipe_file(f"benchmark/{_INDEXED}/{index.name}", index.read_bytes())


def report(figures: dict[str, dict[str, float]]) -> str:
    """A table in Markdown."""
    sides = list(next(iter(figures.values())))
    lines = ["| pairs/s | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for case, rates in figures.items():
        cells = [
            f"{value:.1f}" + ("" if side == _LOCAL else f" ({value / rates[_LOCAL]:.0%})")
            for side, value in rates.items()
        ]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
