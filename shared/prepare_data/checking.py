"""`check`: every sample looked at, and what is wrong as a list."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from shared.data.sources import RandomAccessSource, Source, open_source
from shared.outgoing.atomic_files import write_text_atomically
from shared.outgoing.messages import outgoing
from shared.prepare_data.faults import Examined, Fault, duplicates, examined
from shared.prepare_data.numbered import NumberedSample, numbered
from shared.prepare_data.options import CheckOptions
from shared.prepare_data.parallel import in_order, threads_of
from shared.untrusted import shown
from shared.user_errors import UserError

_LONGEST_DETAIL = 1500  # characters: two paths, each already cut


def run(options: CheckOptions) -> int:
    """0: nothing was found; 1: something was."""
    source = open_source(options.training(resolution=options.resolution))
    faults: list[Fault] = []
    for fault in _faults(source, options):
        faults.append(fault)
        line = f"{fault.kind:<11}{shown(fault.sample)}: {shown(fault.detail, _LONGEST_DETAIL)}"
        tqdm.write(outgoing(line))  # above the progress bar
    if options.report is not None:
        _write_report(Path(options.report), faults)
    counts = Counter(fault.kind for fault in faults)
    print("Found: " + (", ".join(f"{count:,} {kind}" for kind, count in counts.items()) or "nothing"))
    return 1 if faults else 0


def _faults(source: Source, options: CheckOptions) -> Iterator[Fault]:
    def look_at(sample: NumberedSample) -> Examined:
        _, read = sample
        return examined(read(), options.resolution)

    names, digests = list[str](), bytearray()  # of those that could be decoded
    total = len(source) if isinstance(source, RandomAccessSource) else None
    threads = threads_of(options.num_workers)
    with tqdm(total=total, desc="check", unit="sample", dynamic_ncols=True) as bar:
        for sample in in_order(look_at, numbered(source), threads):
            yield from sample.faults
            if sample.digest:
                names.append(sample.name)
                digests += sample.digest
            bar.update()
    for number, first in duplicates(bytes(digests)):
        yield Fault("duplicated", names[number], f"its image and condition are those of {shown(names[first])}")


def _write_report(path: Path, faults: list[Fault]) -> None:
    content = json.dumps([asdict(fault) for fault in faults], indent=2) + "\n"
    try:
        write_text_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"--report {shown(path)} cannot be written: {error.strerror}. Name a file that you may write."
        ) from error
