"""Checkpoints that others edited: both backends read them as they are, or refuse them in one sentence."""

import functools
import itertools
import logging
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints as FlaxCheckpoints
from flax_trainer.checkpoints.torch_checkpoint import is_torch_checkpoint, read_torch_checkpoint, read_torch_record
from flax_trainer.models.params import PLAIN
from flax_trainer.training.state import TrainState
from shared.checkpoints.policy import check_resumable, checkpoint_step
from shared.user_errors import UserError
from tests.shared.checkpoints import hostile_checkpoints as hostile
from tests.torch_trainer.checkpoints.test_safetensors_checkpoints import FILES, RECORD, Folder
from torch_trainer.checkpoints.safetensors_checkpoints import checkpoint_record_of

STEP = 3
BIAS = "conv_in.bias"
Edit = hostile.Edit


class Original(NamedTuple):
    """A checkpoint of each backend, with the same numbers, and what reads them."""

    folder: Folder
    like: TrainState

    def path(self, backend: str) -> Path:
        return self.folder.directory / backend / f"checkpoint-{STEP}"

    def in_torch(self, checkpoint: Path) -> None:
        check_resumable(checkpoint, checkpoint_record_of(checkpoint), RECORD)
        self.folder.checkpoints.restore(checkpoint)

    def in_flax(self, checkpoint: Path) -> None:
        """As `flax_trainer.train` does."""
        if is_torch_checkpoint(checkpoint):
            check_resumable(checkpoint, read_torch_record(checkpoint), RECORD)
            read_torch_checkpoint(checkpoint, dict.fromkeys(self.like.params, PLAIN), self.like)
            return
        reader = FlaxCheckpoints(checkpoint.parent, keep=None, read_only=True)
        check_resumable(checkpoint, reader.record(checkpoint_step(checkpoint)), RECORD)
        reader.restore(checkpoint_step(checkpoint), self.like)

    def refusals(self, checkpoint: Path) -> list[str]:
        """What each backend says; what it reads is the other possibility."""
        return [said for read in (self.in_torch, self.in_flax) for said in refusal(read, checkpoint)]


def refusal(read: Callable[[Path], object], checkpoint: Path) -> list[str]:
    """The sentence, if there is one; anything else that is raised fails the test."""
    try:
        read(checkpoint)
    except ValueError as error:
        refused = error
    else:
        return []
    said = str(refused)
    assert isinstance(refused, UserError), said
    assert f"checkpoint-{STEP}" in said
    assert len(said) < 4000
    assert all(line.isprintable() and not line.startswith("error") for line in said.split("\n")), said
    return [said]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """The Flax backend's is in PyTorch's layouts, which matters to nobody who reads by rank: all are of rank 1."""
    directory = tmp_path_factory.mktemp("runs")
    folder = Folder(directory)
    folder.state.step = STEP
    folder.state._shapes = {name: shape for name, shape in folder.state._shapes.items() if len(shape) == 1}
    folder.checkpoints._directory = directory / "torch"
    folder.save(STEP)
    params = {name: value.numpy() for name, value in folder.state.params().items()}
    like = TrainState.create(params)
    writer = FlaxCheckpoints(directory / "flax", keep=None)
    writer.save(like._replace(step=np.array(STEP, np.int32)), RECORD)
    writer.close()
    return Original(folder, like)


@pytest.fixture(autouse=True)
def _in_silence(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing but our sentence may reach the terminal."""
    with caplog.at_level(logging.WARNING):
        yield
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed
    assert not caplog.records


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_the_originals_are_read_by_both(original: Original, backend: str) -> None:
    assert original.refusals(original.path(backend)) == []


@pytest.mark.parametrize(
    ("backend", "file"), [("torch", "training_state.json"), ("flax", "record/metadata"), ("flax", "state/_METADATA")]
)
def test_every_value_of_its_json_replaced_by_every_other(original: Original, backend: str, file: str) -> None:
    path = original.path(backend) / file
    content = path.read_bytes()
    # Of the lists of arrays, which all look alike, the beginning.
    edits = itertools.islice(hostile.json_edits(content), *((0, 400, 7) if file == "state/_METADATA" else (None,)))
    refused = 0
    for what, result in edits:
        with hostile.edited(path, functools.partial(Path.write_bytes, data=result)):
            said = original.refusals(original.path(backend))
        assert len(said) in (0, 2), f"the backends differ where {what}: {said}"
        refused += bool(said)
    assert refused > 20


@pytest.mark.parametrize("what", [*hostile.CONTENTS, *hostile.IN_PLACE])
@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_every_file_replaced(original: Original, backend: str, what: str) -> None:
    edit = (hostile.CONTENTS | hostile.IN_PLACE)[what]
    refused = []
    for path in sorted(path for path in original.path(backend).rglob("*") if path.is_file()):
        with hostile.edited(path, edit):
            if original.refusals(original.path(backend)):
                refused.append(str(path.relative_to(original.path(backend))))
    needed = FILES[1:] if backend == "torch" else ["record/metadata", "state/_METADATA", "state/manifest.ocdbt"]
    assert set(needed) <= set(refused)


@pytest.mark.parametrize("what", hostile.TENSORS)
def test_arrays_of_other_names_types_and_sizes(original: Original, what: str) -> None:
    checkpoint = original.path("torch")
    for file in ("controlnet/diffusion_pytorch_model.safetensors", "optimizer.safetensors"):
        with hostile.edited(checkpoint / file, hostile.TENSORS[what]), at_most(mib=1024):
            assert len(original.refusals(checkpoint)) == 2


@pytest.mark.parametrize("what", hostile.orbax_edits(BIAS, (8,)))
def test_arrays_in_orbax_of_other_names_types_and_sizes(original: Original, tmp_path: Path, what: str) -> None:
    checkpoint = Path(shutil.copytree(original.path("flax"), tmp_path / f"checkpoint-{STEP}"))
    hostile.orbax_edits(BIAS, (8,))[what](checkpoint)
    with at_most(mib=1024):
        assert len(original.refusals(checkpoint)) == 2


class at_most:
    """Memory that a test may take over what it has."""

    def __init__(self, mib: int):
        self._more = mib * 2**20

    def __enter__(self) -> None:
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def __exit__(self, *_: object) -> None:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < self._before + self._more


def test_types_are_named(original: Original) -> None:
    path = original.path("torch") / "optimizer.safetensors"
    with hostile.edited(path, hostile.TENSORS["as float16"]):
        for said in original.refusals(original.path("torch")):
            assert "other types than this version writes" in said
            assert "float16" in said or "F16" in said


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_a_missing_moment_is_called_missing(original: Original, tmp_path: Path, backend: str) -> None:
    checkpoint = Path(shutil.copytree(original.path(backend), tmp_path / f"checkpoint-{STEP}"))
    if backend == "torch":
        hostile.TENSORS["missing"](checkpoint / "optimizer.safetensors")
    else:
        hostile.without_moment(BIAS)(checkpoint)
    refused = original.refusals(checkpoint)
    assert len(refused) == 2
    for said in refused:
        assert re.search("lacks the moment (exp_avg|mu) of [a-z_.0-9]+: it is damaged", said), said


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_a_folder_of_another_step_is_refused(original: Original, tmp_path: Path, backend: str) -> None:
    checkpoint = Path(shutil.copytree(original.path(backend), tmp_path / "checkpoint-30"))
    for read in (original.in_torch, original.in_flax):
        with pytest.raises(ValueError, match=r"checkpoint-30 holds the state after step 3, which its name denies"):
            read(checkpoint)


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_a_link_out_of_a_checkpoint_is_refused(original: Original, tmp_path: Path, backend: str) -> None:
    """Wherever it lies, and a folder of it too."""
    checkpoint = Path(shutil.copytree(original.path(backend), tmp_path / "run" / f"checkpoint-{STEP}"))
    moved = tmp_path / "elsewhere"
    part = checkpoint / ("controlnet" if backend == "torch" else "state")
    part.rename(moved)
    part.symlink_to(moved)
    for read in (original.in_torch, original.in_flax):
        with pytest.raises(ValueError, match="a link that leads out"):
            read(checkpoint)


@pytest.mark.parametrize("name", ["half of a loss scaler", "endless"])
@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_a_loss_scale_that_is_none_is_refused(original: Original, tmp_path: Path, backend: str, name: str) -> None:
    """An infinite one is halved for ever."""
    checkpoint = Path(shutil.copytree(original.path(backend), tmp_path / f"checkpoint-{STEP}"))
    scaler = '{"scale": 3.5e38, "_growth_tracker": 0}' if name == "endless" else '{"scale": 2.0}'
    if backend == "torch":
        path = checkpoint / "training_state.json"
        path.write_text(path.read_text().replace('"loss_scaler": null', f'"loss_scaler": {scaler}'))
    else:
        hostile.array("loss_scaler.scale", np.array(np.inf, np.float32))(checkpoint)
        if name == "endless":
            hostile.array("loss_scaler.growth_tracker", np.array(0, np.int32))(checkpoint)
    assert len(original.refusals(checkpoint)) == 2


# --- folders of runs -------------------------------------------------------------------------------------------------


def planted(run: Path, outside: Path) -> None:
    """Links and files under every name that a run deletes or renames."""
    outside.mkdir()
    (outside / "precious").touch()
    for name in (
        *("checkpoint-1.unfinished", "checkpoint-2.deleted.unfinished", "checkpoints.deleted"),
        *("checkpoint-4.orbax-checkpoint-tmp", "checkpoint-5.abandoned", "checkpoint-6"),
    ):
        (run / name).symlink_to(outside)
    (run / "checkpoint-7.unfinished").touch()
    (run / "checkpoint-7.orbax-checkpoint-tmp").touch()
    (run / "checkpoint-8").symlink_to("nothing")
    (run / "checkpoint-9.unfinished").symlink_to("checkpoint-9.unfinished")
    os.mkfifo(run / "checkpoint-10.unfinished")


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_nothing_is_deleted_outside_of_the_run(original: Original, tmp_path: Path, backend: str) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    planted(run, outside)
    if backend == "torch":
        folder = Folder(run, keep=1)
        folder.save(2, 6, 8).assert_whole(8)
    else:
        checkpoints = FlaxCheckpoints(run, keep=1)
        for step in (2, 6, 8):
            checkpoints.save(original.like._replace(step=np.array(step, np.int32)), RECORD)
        checkpoints.close()
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (run / "checkpoint-8").is_dir()
    assert not (run / "checkpoint-2").exists()


@pytest.mark.parametrize("what", hostile.IN_PLACE)
@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "record/metadata"])
def test_a_run_saves_beside_a_checkpoint_that_is_broken(
    original: Original, tmp_path: Path, file: str, what: str
) -> None:
    """It is not read; unless Orbax would have to, it makes way for newer ones as any other."""
    checkpoint = Path(shutil.copytree(original.path("flax"), tmp_path / f"checkpoint-{STEP}"))
    hostile.IN_PLACE[what](checkpoint / file)
    checkpoints = FlaxCheckpoints(tmp_path, keep=1)
    checkpoints.save(original.like._replace(step=np.array(STEP + 1, np.int32)), RECORD)
    checkpoints.close()
    left = {f"checkpoint-{STEP + 1}"} | ({checkpoint.name} if checkpoint.exists() else set())
    assert {path.name for path in tmp_path.iterdir()} == left
    assert not checkpoint.exists() or file == "_CHECKPOINT_METADATA"
