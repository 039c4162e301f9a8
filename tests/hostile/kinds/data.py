"""Training data: shards, folders, lists, tables, pictures, captions; two batches are read, as a training reads them."""

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import webdataset  # noqa: F401 (in the warm process, for its children)

from shared.config import TrainConfig
from shared.config.demo import BASE_MODEL
from shared.data.batches import BatchLoader, BatchSpec
from shared.data.sources import Source, open_sources
from shared.data.tokenization import PromptInputs, tokenizer_function
from shared.models.source import ModelSource
from shared.models.tokenizer_files import read_tokenizer
from shared.outgoing.messages import set_up_logging
from tests.hostile.case import Case
from tests.hostile.kinds import place_of
from tests.hostile.mutations.addresses import hostile_address
from tests.hostile.mutations.binary import mutated_bytes
from tests.hostile.mutations.captions import hostile_caption_file
from tests.hostile.mutations.pictures import honest_picture, hostile_picture
from tests.hostile.mutations.places import displace, files_in, plant, rename
from tests.hostile.mutations.tars import PACKINGS, Member, compressed, encoded, mutated_tar, pax, swelling_gzip
from tests.hostile.mutations.values import hostile_text, mutated_json, mutated_json_lines, pick, snippet
from tests.hostile.outcome import Outcome, Sign
from tests.hostile.signs import are_private_pixels, signs_in_files
from tests.hostile.watched import Attempt

_TOKENIZE = tokenizer_function(read_tokenizer(ModelSource(BASE_MODEL, "tokenizer")))
_PAIRS = 6
_ROWS = 4  # of a batch
_COLUMNS = ("image", "conditioning_image", "text")

Values = dict[str, Any]
Recipe = Callable[[Case], tuple[str, Values]]
"""Writes the data of a case: what is hostile about it, in words, and the flags that name it."""


@dataclass
class Pair:
    """A training pair as files."""

    image: bytes
    conditioning_image: bytes
    caption: bytes
    caption_ending: str = "txt"

    @property
    def text(self) -> str:
        return self.caption.decode("utf-8", "surrogatepass")


class HostileData(NamedTuple):
    """What a recipe has written.

    Attributes:
        what: is hostile about it, in a few words.
        values: the flags that name it.
        is_honest: nothing is.
        may_show: files outside of its folder may be shown, for the user lets them.
        private: as of an `Attempt`.
    """

    what: str
    values: Values
    is_honest: bool
    may_show: bool
    private: tuple[Path, ...]


def hostile_data(case: Case) -> HostileData:
    """By the recipe that the case's number says."""
    recipe = _RECIPES[place_of(case.number).rank % len(_RECIPES)]
    what, values = recipe(case)
    is_allowed = recipe is _allowed_folder
    # A shard is named by the user.
    private = () if is_allowed or recipe is _displaced_shard else (case.outside,)
    return HostileData(what, values, recipe is _nothing or is_allowed, is_allowed, private)


def build(case: Case) -> Attempt:
    """A case of its recipe, read as a training reads it."""
    return training_on(case, hostile_data(case))


def training_on(case: Case, data: HostileData) -> Attempt:
    """Two batches."""
    config = TrainConfig(
        resolution=32,
        seed=case.below(100),
        max_skipped_samples=pick(case, (0, 2, 100)),
        dataloader_num_workers=pick(case, (0, 0, 2)),
        mismatched_pairs="crop",  # honest pictures are of several shapes
        cache_dir=str(case.folder / "cache"),
        **data.values,
    )
    training = _Training(config)

    def signs() -> Iterator[Sign]:
        return iter(()) if data.may_show else training.signs(case)

    return Attempt(data.what, training.run, signs, is_honest=data.is_honest, private=data.private)


class _Training:
    """As far as it has to do with data. What it has seen stays, for whoever inspects it."""

    def __init__(self, config: TrainConfig):
        self._config = config
        self._captions: list[str] = []
        self._batches: list[dict[str, npt.NDArray[Any]]] = []
        self._manifests: list[str] = []

    def run(self) -> int:
        set_up_logging("shared")
        for source in open_sources(self._config):
            if source is not None:
                self._read(source)
        return 0

    def _read(self, source: Source) -> None:
        self._manifests.append(json.dumps(source.manifest))
        loader = BatchLoader(source, self._config, PromptInputs(self._tokenize), BatchSpec(_ROWS), (4, 4, 4), 1000)
        try:
            for step, batch in loader.iterate():
                self._batches.append(batch)
                if step == 1:
                    break
        finally:
            loader.close()

    def _tokenize(self, captions: Sequence[str]) -> npt.NDArray[np.int32]:
        self._captions.extend(captions)
        return _TOKENIZE(captions)

    def signs(self, case: Case) -> Iterator[Sign]:
        if any(case.secret in caption for caption in self._captions):
            yield Sign(Outcome.LEAKED, "a caption comes from outside of the data's folder")
        for batch in self._batches:
            for name in batch.keys() & {"pixel_values", "conditioning_pixel_values"}:
                if any(are_private_pixels(picture) for picture in batch[name].reshape(-1, *batch[name].shape[-3:])):
                    yield Sign(Outcome.LEAKED, f"{name} hold a picture from outside of the data's folder")
        if any(case.secret in manifest for manifest in self._manifests):
            yield Sign(Outcome.LEAKED, "the manifest holds a secret")
        yield from signs_in_files(case, case.out)


# --- layouts ---------------------------------------------------------------------------------------------------------


def _pairs(case: Case) -> list[Pair]:
    return [Pair(honest_picture(case), honest_picture(case), f"caption {index}".encode()) for index in range(_PAIRS)]


def _write_pictures(case: Case, pairs: Sequence[Pair]) -> None:
    for index, pair in enumerate(pairs):
        for column, content in (("image", pair.image), ("conditioning_image", pair.conditioning_image)):
            path = case.inputs / column / f"{index}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)


def _write_list(case: Case, name: str, keys: tuple[str, str, str], pairs: Sequence[Pair]) -> Path:
    _write_pictures(case, pairs)
    back = "../" * (len(Path(name).parts) - 1)
    rows = (
        dict(zip(keys, (f"{back}image/{index}.png", f"{back}conditioning_image/{index}.png", pair.text), strict=True))
        for index, pair in enumerate(pairs)
    )
    path = case.inputs / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


_METADATA = ("image_file_name", "conditioning_image_file_name", "text")
_LISTS: tuple[tuple[str, tuple[str, str, str]], ...] = (
    ("metadata.jsonl", _METADATA),
    ("metadata.jsonl", ("file_name", "conditioning_image", "text")),
    ("prompt.json", ("target", "source", "prompt")),
)


def _list_layout(case: Case, pairs: Sequence[Pair]) -> tuple[Path, tuple[str, str, str], Values]:
    name, keys = pick(case, _LISTS)
    values: Values = {"train_data_dir": str(case.inputs)}
    if case.chance(0.15):
        values["num_evaluation_samples"] = 2
    return _write_list(case, name, keys, pairs), keys, values


def _samples(pairs: Sequence[Pair]) -> list[list[Member]]:
    return [
        [
            Member(f"{index:04d}.image.png", pair.image),
            Member(f"{index:04d}.cond.png", pair.conditioning_image),
            Member(f"{index:04d}.text.{pair.caption_ending}", pair.caption),
        ]
        for index, pair in enumerate(pairs)
    ]


def _write_shard(case: Case, content: bytes, *, compress: bool | None = None) -> Values:
    """A tar, or one compressed, which is read as a stream."""
    name = "train-000.tar"
    if case.chance(0.4) if compress is None else compress:
        if case.chance(0.8):
            name, content = f"{name}.gz", gzip.compress(content, 1)
        else:
            ending, pack = pick(case, PACKINGS)
            name, content = name + ending, pack(content)
    (case.inputs / name).write_bytes(content)
    return {"train_shards": (str(case.inputs / name),)}


def _write_pairs(case: Case, pairs: Sequence[Pair]) -> Values:
    """In some layout."""
    if case.chance(0.5):
        return _write_shard(case, encoded(member for sample in _samples(pairs) for member in sample))
    if case.chance(0.25):
        return _write_parquet(case, pairs)
    return _list_layout(case, pairs)[2]


def _table(pairs: Sequence[Pair]) -> datasets.Dataset:
    def encoded_picture(content: bytes) -> Values:
        return {"bytes": content, "path": None}

    columns = {
        "image": [encoded_picture(pair.image) for pair in pairs],
        "conditioning_image": [encoded_picture(pair.conditioning_image) for pair in pairs],
        "text": [pair.text.encode("utf-8", "replace").decode() for pair in pairs],
    }
    features = datasets.Features(
        image=datasets.Image(), conditioning_image=datasets.Image(), text=datasets.Value("string")
    )
    return datasets.Dataset.from_dict(columns, features)


def _write_parquet(case: Case, pairs: Sequence[Pair]) -> Values:
    _table(pairs).to_parquet(case.inputs / "train.parquet")
    return _loaded_by_datasets(case)


def _loaded_by_datasets(case: Case) -> Values:
    return {"dataset_name": str(case.inputs), "streaming": case.chance(0.3), "max_train_samples": pick(case, (None, 4))}


# --- recipes ---------------------------------------------------------------------------------------------------------


def _hostile_picture(case: Case) -> tuple[str, Values]:
    pairs = _pairs(case)
    name, content = hostile_picture(case)
    for pair in pairs if case.chance(0.2) else [pick(case, pairs), pairs[0]]:
        if case.chance(0.5):
            pair.image = content
        else:
            pair.conditioning_image = content
    return name, _write_pairs(case, pairs)


def _hostile_caption(case: Case) -> tuple[str, Values]:
    pairs = _pairs(case)
    name, ending, content = hostile_caption_file(case)
    for pair in pairs if case.chance(0.5) else [pick(case, pairs)]:
        pair.caption, pair.caption_ending = content, ending
    return name, _write_shard(case, encoded(member for sample in _samples(pairs) for member in sample))


def _hostile_text_in_rows(case: Case) -> tuple[str, Values]:
    pairs = _pairs(case)
    for pair in pairs:
        pair.caption = hostile_text(case).encode("utf-8", "surrogatepass")
    return "captions that forge", _write_pairs(case, pairs)


def _mutated_list(case: Case) -> tuple[str, Values]:
    path, keys, values = _list_layout(case, _pairs(case))
    content = path.read_bytes()
    path.write_bytes(mutated_bytes(case, content) if case.chance(0.1) else mutated_json_lines(case, content, keys))
    return f"{path.name} mutated", values


def _list_of_addresses(case: Case) -> tuple[str, Values]:
    path, keys, values = _list_layout(case, _pairs(case))
    _set_traps(case)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    address = hostile_address(case)
    key = keys[case.below(2)]
    for row in rows if case.chance(0.7) else rows[:1]:
        row[key] = address
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if case.chance(0.1):
        values["allowed_data_dirs"] = (str(case.inputs / "image"),)
    return f"{path.name} names {address[:80]!a}", values


def _set_traps(case: Case) -> None:
    """What some addresses lead to."""
    (case.inputs / "link.png").symlink_to(case.outside / "private.png")
    (case.inputs / "linked").symlink_to(case.outside)
    os.mkfifo(case.inputs / "pipe.png")


def _displaced(case: Case) -> tuple[str, Values]:
    path, _, values = _list_layout(case, _pairs(case))
    chosen = path if case.chance(0.2) else pick(case, files_in(case.inputs))
    if case.chance(0.2):
        chosen = chosen.parent
        if chosen == case.inputs:
            chosen = case.inputs / "image"
    return displace(case, chosen), values


def _renamed(case: Case) -> tuple[str, Values]:
    path, keys, values = _list_layout(case, _pairs(case))
    planted = plant(case, case.inputs)
    renamed = rename(case, pick(case, files_in(case.inputs / "image")))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0][keys[0]] = f"image/{renamed.name}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{planted}, a picture is called {ascii(renamed.name)[:60]}", values


def _mutated_shard(case: Case) -> tuple[str, Values]:
    name, content = mutated_tar(case, _samples(_pairs(case)))
    return name, _write_shard(case, content)


def _compressed_shard(case: Case) -> tuple[str, Values]:
    content = encoded(member for sample in _samples(_pairs(case)) for member in sample)
    ending, packed = compressed(case, content)
    name = f"train.tar{ending if case.chance(0.8) else pick(case, ('', '.gz', '.xz', '.zst'))}"
    (case.inputs / name).write_bytes(packed)
    return f"{name} of {ending}", {"train_shards": (str(case.inputs / name),)}


def _swelling_shard(case: Case) -> tuple[str, Values]:
    samples = encoded(member for sample in _samples(_pairs(case)) for member in sample)[:-1024]
    large = Member(
        pick(
            case,
            ("9999.image.png", "0005.text.json", "9999.text.txt", "x", "9999.bin", "PaxHeaders/x", "././@LongLink"),
        ),
        kind=pick(case, (b"0", b"0", b"x", b"L", b"S", b"g")),
        size_field=b"%011o\x00" % (6 * 10**9),
    )
    (case.inputs / "train.tar.gz").write_bytes(swelling_gzip(samples + large.encoded(), 6))
    return f"a .tar.gz with a member of 6 GB ({large.name})", {"train_shards": (str(case.inputs / "train.tar.gz"),)}


def _displaced_shard(case: Case) -> tuple[str, Values]:
    content = encoded(member for sample in _samples(_pairs(case)) for member in sample)
    values = _write_shard(case, content)
    path = Path(values["train_shards"][0])
    what = (
        displace(case, path) if case.chance(0.7) else f"a shard called {ascii((path := rename(case, path)).name)[:60]}"
    )
    return what, {"train_shards": (str(path),)}


def _several_shards(case: Case) -> tuple[str, Values]:
    samples = _samples(_pairs(case))
    ending = pick(case, ("", ".gz"))
    name, hostile = mutated_tar(case, samples)
    for number, content in enumerate((encoded(member for sample in samples for member in sample), hostile)):
        packed = gzip.compress(content, 1) if ending else content
        (case.inputs / f"train-{number:03d}.tar{ending}").write_bytes(packed)
    return f"the second of two: {name}", {"train_shards": (str(case.inputs / f"train-{{000..001}}.tar{ending}"),)}


def _hostile_pax_caption(case: Case) -> tuple[str, Values]:
    samples = _samples(_pairs(case))
    members = [member for sample in samples for member in sample]
    values = {
        pick(case, ("comment", "mtime", "uid", "linkpath", "hdrcharset", "SCHILY.xattr.x", "charset")): snippet(case)[
            :5000
        ]
    }
    return f"a PAX header of {next(iter(values))}", _write_shard(case, encoded([pax(**values), *members]))


def _csv_of_addresses(case: Case) -> tuple[str, Values]:
    pairs = _pairs(case)
    _write_pictures(case, pairs)
    _set_traps(case)
    address = hostile_address(case)
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(_COLUMNS)
    for index, pair in enumerate(pairs):
        row = [f"image/{index}.png", f"conditioning_image/{index}.png", pair.text]
        row[case.below(2)] = address
        writer.writerow(row)
    (case.inputs / "train.csv").write_text(file.getvalue(), errors="surrogatepass", newline="")
    return f"train.csv names {address[:80]!a}", _loaded_by_datasets(case)


def _mutated_table(case: Case) -> tuple[str, Values]:
    """Of any format that datasets loads."""
    pairs = _pairs(case)
    _write_pictures(case, pairs)
    table = _table(pairs)
    name = pick(
        case, ("train.parquet", "train.csv", "train.json", "train.arrow", "train.jsonl", "train.txt", "train.zip")
    )
    path = case.inputs / name
    if name == "train.parquet":
        table.to_parquet(path)
    else:
        path.write_text("image,conditioning_image,text\nimage/0.png,conditioning_image/0.png,a\n")
        if name.startswith("train.json"):
            path.write_text('{"image": "image/0.png", "conditioning_image": "conditioning_image/0.png", "text": "a"}\n')
    what = displace(case, path) if case.chance(0.2) else f"{name} mutated"
    if path.is_file() and not path.is_symlink() and path.stat().st_size < 10**7:
        path.write_bytes(mutated_bytes(case, path.read_bytes()))
    return what, _loaded_by_datasets(case)


def _parquet_of_paths(case: Case) -> tuple[str, Values]:
    """An image column whose rows hold no bytes but a path."""
    _set_traps(case)
    address = hostile_address(case).replace("\x00", "").encode("utf-8", "replace").decode()
    features = datasets.Features(
        image=datasets.Image(), conditioning_image=datasets.Image(), text=datasets.Value("string")
    )
    rows = {column: [{"bytes": None, "path": address}] * _PAIRS for column in _COLUMNS[:2]} | {"text": ["a"] * _PAIRS}
    table = datasets.Dataset.from_dict(rows, features).data.table  # datasets itself would put the files' content in
    pyarrow.parquet.write_table(table, case.inputs / "train.parquet")
    return f"a table's paths are {address[:80]!a}", _loaded_by_datasets(case)


def _card_of_a_dataset(case: Case) -> tuple[str, Values]:
    """README.md tells datasets which files belong to it, and of which types they are."""
    _write_parquet(case, _pairs(case))
    outside = pick(
        case,
        (
            str(case.outside / "secret.csv"),
            "../outside/secret.csv",
            f"file://{case.outside}/secret.csv",
            "**",
            "/dev/zero",
        ),
    )
    (case.inputs / "README.md").write_text(
        pick(
            case,
            (
                f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(outside)}\n---\n",
                f"---\nconfigs:\n- config_name: default\n  data_dir: {json.dumps(outside)}\n---\n",
                f"---\nconfigs: {snippet(case)}\n---\n",
                f"---\ndataset_info: {snippet(case)}\n---\n",
                f"---\ndataset_info:\n  features: {snippet(case)}\n---\n",
                f"---\n{'[' * 3000}\n---\n",
                "---\n- !!python/object/apply:os.mkdir ['" + str(case.executed) + "']\n---\n",
            ),
        ),
        encoding="utf-8",
        errors="surrogatepass",
    )
    return f"README.md says {outside!a}", _loaded_by_datasets(case)


def _saved_dataset(case: Case) -> tuple[str, Values]:
    _table(_pairs(case)).save_to_disk(case.inputs / "saved")
    path = pick(case, files_in(case.inputs))
    if case.chance(0.3):
        what = displace(case, path)
    else:
        content = path.read_bytes()
        path.write_bytes(
            mutated_json(case, content) if path.suffix == ".json" and case.chance(0.8) else mutated_bytes(case, content)
        )
        what = f"{path.name} of a saved dataset mutated"
    return what, {"train_data_dir": str(case.inputs / "saved"), "load_from_disk": True}


def _script_of_a_dataset(case: Case) -> tuple[str, Values]:
    script = f"import os\nos.mkdir({str(case.executed)!r})\n"
    for name in ("inputs.py", "dataset.py", "__init__.py", "datasets.py"):
        (case.inputs / name).write_text(script)
    return "a dataset's script", _loaded_by_datasets(case)


def _folder_of_chance(case: Case) -> tuple[str, Values]:
    """A folder of which nobody knows what it is."""
    _write_pictures(case, _pairs(case))
    planted = [plant(case, case.inputs) for _ in range(1 + case.below(3))]
    if case.chance(0.5):
        displace(case, case.inputs / pick(case, ("metadata.jsonl", "metadata.csv", "prompt.json", "train", "data")))
    return ", ".join(planted), pick(case, ({"train_data_dir": str(case.inputs)}, _loaded_by_datasets(case)))


def _nothing(case: Case) -> tuple[str, Values]:
    return "nothing", _write_pairs(case, _pairs(case))


def _allowed_folder(case: Case) -> tuple[str, Values]:
    """Rows that lead out to where the user lets them."""
    path, keys, values = _list_layout(case, _pairs(case))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    private = str(case.outside / "private.png")
    rows[0][keys[0]], rows[1][keys[1]] = private, f"../outside/{Path(private).name}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "nothing that is not allowed", values | {"allowed_data_dirs": (str(case.outside),)}


_RECIPES: Sequence[Recipe] = (
    _hostile_picture,
    _mutated_list,
    _mutated_shard,
    _hostile_picture,
    _list_of_addresses,
    _hostile_caption,
    _mutated_shard,
    _displaced,
    _hostile_picture,
    _mutated_list,
    _csv_of_addresses,
    _mutated_shard,
    _hostile_caption,
    _list_of_addresses,
    _hostile_picture,
    _displaced_shard,
    _mutated_table,
    _compressed_shard,
    _hostile_text_in_rows,
    _mutated_shard,
    _hostile_picture,
    _parquet_of_paths,
    _several_shards,
    _renamed,
    _saved_dataset,
    _hostile_pax_caption,
    _card_of_a_dataset,
    _swelling_shard,
    _folder_of_chance,
    _hostile_picture,
    _script_of_a_dataset,
    _nothing,
    _allowed_folder,
)
