"""What `shared.prepare_data` made, broken afterwards: shards with an index, and caches, read as a training reads them.

`tests.shared.data.shard_corruptions` reads many more of them, in one process and without what stands in files' places.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from shared.config import TrainConfig
from shared.config.demo import BASE_MODEL
from shared.data.sources import RandomAccessSource, open_source
from shared.data.sources.shard_index import SUFFIX
from shared.data.sources.shard_keys import shard_keys
from shared.prepare_data.command import main
from shared.prepare_data.indexing import index_shards
from tests.hostile.case import Case
from tests.hostile.kinds.data import HostileData, training_on
from tests.hostile.mutations.places import files_in, mutate_file, plant
from tests.hostile.mutations.values import pick
from tests.hostile.watched import Attempt
from tests.shared.data.index_corruptions import forged
from tests.shared.data.pictures import pairs, write_tars
from tests.shared.data.shard_corruptions import encode_captions, write_cache

_HONEST = 0.05


def build(case: Case) -> Attempt:
    """Shards with an index or a cache, and one file or two of it broken."""
    shards = str(write_tars(case.inputs / "shards", pairs(5), per_shard=3))
    if case.chance(0.5):
        return _cache(case, shards)
    return _index(case, shards)


def _index(case: Case, shards: str) -> Attempt:
    folder = Path(shards).parent
    index_shards(sorted(folder.glob("*.tar")), shard_keys(None, None, None), 0)
    (index,) = folder.glob(f"*{SUFFIX}")
    is_honest = case.chance(_HONEST)
    what = "nothing"
    if not is_honest and case.chance(0.3):
        index.write_bytes(forged(case.rng, index.read_bytes(), parts=3))
        what = "a forged index"
    elif not is_honest:
        what = _broken(case, folder, index)
    data = HostileData(what, {"train_shards": (shards,)}, is_honest, may_show=False, private=())
    if case.chance(0.3):
        command = partial(main, ["index", shards, "--num_workers", "0"])
        return Attempt(f"index again: {what}", command, is_honest=is_honest)
    return training_on(case, data)


def _cache(case: Case, shards: str) -> Attempt:
    folder = case.inputs / "cache"
    write_cache(folder, shards)
    is_honest = case.chance(_HONEST)
    what = "nothing" if is_honest else _broken(case, folder, pick(case, files_in(folder)))
    values = {"cached_data": str(folder), "pretrained_model_name_or_path": str(BASE_MODEL)}
    attempt = training_on(case, HostileData(f"a cache: {what}", values, is_honest, may_show=False, private=()))
    config = TrainConfig(resolution=32, **values)
    return attempt._replace(run=partial(_start, config, attempt.run))


def _start(config: TrainConfig, read_batches: Callable[[], int | None]) -> int | None:
    """What a training does with a cache: its captions, then its batches."""
    source = open_source(config)
    assert isinstance(source, RandomAccessSource)
    encode_captions(config, source)
    return read_batches()


def _broken(case: Case, folder: Path, path: Path) -> str:
    whats = [mutate_file(case, path)]
    others = [other for other in files_in(folder) if other != path]
    if others and case.chance(0.3):
        whats.append(mutate_file(case, pick(case, others)))
    if case.chance(0.1):
        whats.append(plant(case, folder))
    return ", ".join(whats)
