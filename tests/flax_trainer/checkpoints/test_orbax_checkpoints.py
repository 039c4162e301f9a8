"""Checkpoints on a real disk: complete or absent, whatever happens to the process, the disk or the files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints
from flax_trainer.training.state import TrainState
from shared.checkpoints.choice import checkpoint_to_resume
from shared.checkpoints.completing import tidy
from shared.checkpoints.digests import Verdict, examine
from shared.checkpoints.policy import check_resumable, checkpoint_record, checkpoints_in
from shared.checkpoints.retention import is_timed
from shared.config import TrainConfig

ROOT = Path(__file__).resolve().parents[3]
RECORD = checkpoint_record(
    TrainConfig(pretrained_model_name_or_path="some/model"), {"location": ["a.tar"], "samples": 8}, 8
)


def params(step: int, rows: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        "controlnet_cond_embedding.conv_in.weight": rng.standard_normal((3, 3, rows, 5), np.float32),
        "conv_in.bias": rng.standard_normal(5, np.float32),
        "scale": np.array(rng.standard_normal(), np.float32),
    }


def state(step: int, rows: int = 4) -> TrainState:
    return TrainState(
        np.array(step, np.int32),
        params(step, rows),
        params(step + 1000, rows),
        params(step + 2000, rows),
        non_finite=np.array(False),
    )


def assert_same(left: TrainState, right: TrainState) -> None:
    """Bit for bit, with names, types and shapes."""
    assert str(jax.tree.structure(left)) == str(jax.tree.structure(right))
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert isinstance(a, np.ndarray)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def save(folder: Path, *steps: int, keep: int | None = None, rows: int = 4) -> None:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(state(step, rows), RECORD)
    checkpoints.close()


def run_script(script: str, *arguments: object, **environment: str) -> str:
    """Run Python in a process of its own; it must end well. Returns what it printed."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- there and back --------------------------------------------------------------------------------------------------


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    special = state(2**31 - 1)
    special.params["conv_in.bias"][:] = [np.nan, -0.0, np.inf, np.finfo(np.float32).tiny / 8, -np.inf]
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(special, RECORD)
    checkpoints.wait()
    assert_same(checkpoints.restore(2**31 - 1, state(0)), special)
    checkpoints.close()


def test_the_record_comes_back_and_lets_the_run_go_on(tmp_path: Path) -> None:
    save(tmp_path, 3)
    checkpoints = Checkpoints(tmp_path, keep=None, read_only=True)
    assert checkpoints.record(3) == RECORD
    check_resumable(tmp_path / "checkpoint-3", checkpoints.record(3), RECORD)
    checkpoints.close()


def test_a_saved_state_is_not_halted(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(state(3)._replace(non_finite=np.array(True)), RECORD)
    checkpoints.wait()
    assert_same(checkpoints.restore(3, state(0)), state(3))
    checkpoints.close()


def test_arrays_may_change_once_save_has_returned_and_the_save_is_over(tmp_path: Path) -> None:
    mine = state(3)
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(mine, RECORD)
    checkpoints.wait()
    mine.params["conv_in.bias"][:] = 0
    assert_same(checkpoints.restore(3, state(0)), state(3))
    checkpoints.close()


def test_a_save_goes_on_while_the_run_writes_over_its_donated_buffers(tmp_path: Path) -> None:
    from flax_trainer.distributed.pmap import PmapEngine

    original = state(3, rows=2000)
    step = jax.pmap(lambda s: jax.tree.map(jnp.negative, s), donate_argnums=(0,))
    engine = PmapEngine()
    moving = engine.place_state(original._replace(non_finite=np.array(0, np.int32)))
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(engine.to_save(moving), RECORD)
    for _ in range(5):
        moving = step(moving)
    checkpoints.wait()
    assert_same(checkpoints.restore(3, original), original)
    checkpoints.close()


# --- names and retention ---------------------------------------------------------------------------------------------


def test_names_are_those_of_diffusers(tmp_path: Path) -> None:
    save(tmp_path, 1, 20, 300)
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-20", "checkpoint-300"]
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-1", "checkpoint-20", "checkpoint-300"]


@pytest.mark.parametrize(("keep", "left"), [(1, [90]), (2, [80, 90]), (3, [70, 80, 90]), (None, [50, 60, 70, 80, 90])])
def test_the_newest_are_kept(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    save(tmp_path, 50, 60, 70, 80, 90, keep=keep)
    assert names_in(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_retention_counts_those_of_the_run_before(tmp_path: Path) -> None:
    save(tmp_path, 8, 9, 10)
    save(tmp_path, 11, keep=2)
    assert names_in(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_the_newest_are_those_saved_last_whatever_their_numbers(tmp_path: Path) -> None:
    """A run that was resumed from an older checkpoint."""
    save(tmp_path, 8, 9, 10)
    save(tmp_path, 5, 6, 7, keep=2)
    assert names_in(tmp_path) == ["checkpoint-6", "checkpoint-7"]


def test_a_timed_one_goes_when_a_newer_one_is_complete(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, keep=2)
    for timed in (3, 5):
        checkpoints = Checkpoints(tmp_path, keep=2)
        checkpoints.save(state(timed), RECORD, timed=True)
        checkpoints.close()
        assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-2", f"checkpoint-{timed}"]
        assert is_timed(tmp_path / f"checkpoint-{timed}")
        assert examine(tmp_path / f"checkpoint-{timed}") == Verdict(True, ())
        assert_same(Checkpoints(tmp_path, keep=None, read_only=True).restore(timed, state(0)), state(timed))
    save(tmp_path, 6, keep=2)
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-6"]


def test_a_step_is_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 3, 6)
    replaced = state(9)._replace(step=np.array(3, np.int32))
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(replaced, RECORD | {"global_batch_size": 16})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 6]
    assert_same(checkpoints.restore(3, state(0)), replaced)
    assert_same(checkpoints.restore(6, state(0)), state(6))
    assert checkpoints.record(3)["global_batch_size"] == 16
    checkpoints.close()


def test_other_files_of_the_run_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "validation" / "step-3").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    save(tmp_path, 3, 6, keep=1)
    assert names_in(tmp_path) == ["checkpoint-6", "config.yaml", "validation"]


def test_reading_changes_nothing_in_the_folder(tmp_path: Path) -> None:
    """It may belong to another run, which may be in the middle of a save."""
    save(tmp_path, 3, 6)
    unfinished = tmp_path / "checkpoint-9.orbax-checkpoint-tmp"
    unfinished.mkdir()
    reader = Checkpoints(tmp_path, keep=None, read_only=True)
    assert_same(reader.restore(3, state(0)), state(3))
    reader.close()
    assert names_in(tmp_path) == ["checkpoint-3", "checkpoint-6", unfinished.name]

    save(tmp_path, 9)
    assert names_in(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]


# --- what is wrong, told plainly -------------------------------------------------------------------------------------


def test_a_controlnet_of_another_shape_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 3)
    other = state(0, rows=7)
    del other.params["scale"]
    checkpoints = Checkpoints(tmp_path, keep=None)
    with pytest.raises(ValueError, match=r"checkpoint-3.* 4 arrays differ") as refused:
        checkpoints.restore(3, other)
    checkpoints.close()
    name = "params/controlnet_cond_embedding.conv_in.weight"
    assert f"{name}: float32 [3, 3, 4, 5] in the checkpoint, float32 [3, 3, 7, 5] expected" in str(refused.value)
    assert "params/scale: float32 [] in the checkpoint, nothing expected" in str(refused.value)


def test_other_types_are_not_converted_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 3)
    checkpoints = Checkpoints(tmp_path, keep=None)
    with pytest.raises(ValueError, match=r"step: int32 \[\] in the checkpoint, int64 \[\] expected"):
        checkpoints.restore(3, state(0)._replace(step=np.array(0, np.int64)))
    checkpoints.close()


def test_a_step_that_is_not_there(tmp_path: Path) -> None:
    save(tmp_path, 3, 6)
    checkpoints = Checkpoints(tmp_path, keep=None)
    with pytest.raises(ValueError, match=r"checkpoint-4.*there: checkpoint-3, checkpoint-6"):
        checkpoints.restore(4, state(0))
    checkpoints.close()


def test_a_checkpoint_of_another_program_is_refused(tmp_path: Path) -> None:
    """diffusers' own scripts name theirs the same."""
    (tmp_path / "checkpoint-500" / "controlnet").mkdir(parents=True)
    (tmp_path / "checkpoint-500" / "optimizer.bin").write_bytes(b"PK")
    assert checkpoint_to_resume(tmp_path, "latest") == tmp_path / "checkpoint-500"
    checkpoints = Checkpoints(tmp_path, keep=None, read_only=True)
    with pytest.raises(ValueError, match=r"checkpoint-500 cannot be read.*another program"):
        checkpoints.record(500)
    checkpoints.close()


DAMAGE = """
import json, os, shutil, sys
from pathlib import Path
from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints
from test_orbax_checkpoints import assert_same, save, state

folder = Path(sys.argv[1])
save(folder / "good", 3, 6, rows=1000)
found = (folder / "good/checkpoint-6").rglob("*")
files = sorted(path.relative_to(folder / "good") for path in found if path.is_file())
results = {}
for kind in ("emptied", "truncated", "deleted"):
    for file in files:
        bad = folder / "bad"
        shutil.copytree(folder / "good", bad)
        size = (bad / file).stat().st_size
        (bad / file).unlink() if kind == "deleted" else os.truncate(bad / file, size // 2 if kind == "truncated" else 0)
        reader = Checkpoints(bad, keep=None, read_only=True)
        try:
            reader.record(6)
            assert_same(reader.restore(6, state(0, 1000)), state(6, 1000))
            results[f"{kind} {file}"] = "intact"
        except ValueError as error:
            results[f"{kind} {file}"] = str(error)
        assert_same(reader.restore(3, state(0, 1000)), state(3, 1000))
        reader.close()
        shutil.rmtree(bad)
print(json.dumps(results))
"""


def test_damaged_files_are_found_and_the_folder_is_named(tmp_path: Path) -> None:
    """Each file of a checkpoint in turn; what still restores without it must be right."""
    results: dict[str, str] = json.loads(run_script(DAMAGE, tmp_path))
    refused = {damage: message for damage, message in results.items() if message != "intact"}
    for damage, message in refused.items():
        assert message.startswith(f"{tmp_path}/bad/checkpoint-6 cannot be read"), damage
        assert "checkpoint-3" in message
        assert "tensorstore_spec" not in message
        assert len(message) < 1500
    for file in ("record/metadata", "state/_METADATA", "state/manifest.ocdbt"):
        assert f"truncated checkpoint-6/{file}" in refused
    assert any("/ocdbt.process_0/d/" in damage for damage in refused), "a data file went missing unnoticed"


def test_one_flipped_bit_in_any_file_is_found_and_named(tmp_path: Path) -> None:
    save(tmp_path, 3, 6, rows=100)
    found = [path for path in (tmp_path / "checkpoint-6").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(found) > 5
    for path in found:
        content = path.read_bytes()
        flipped = content[len(content) // 2] ^ 1
        path.write_bytes(content[: len(content) // 2] + bytes([flipped]) + content[len(content) // 2 + 1 :])
        assert checkpoint_to_resume(tmp_path, "latest") == tmp_path / "checkpoint-3"
        with pytest.raises(ValueError, match="checkpoint-6 is damaged") as refused:
            checkpoint_to_resume(tmp_path, "checkpoint-6")
        assert path.relative_to(tmp_path / "checkpoint-6").as_posix() in str(refused.value)
        path.write_bytes(content)
    assert checkpoint_to_resume(tmp_path, "latest") == tmp_path / "checkpoint-6"


# --- kill -9 ---------------------------------------------------------------------------------------------------------

# One process imports everything and starts a new run of saves for every kill: a process each would take seconds each.
KILLS = """
import os, signal, sys, time
from pathlib import Path
from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints
from test_orbax_checkpoints import RECORD, state

folder, step = Path(sys.argv[1]), 0
for delay in map(float, sys.argv[2:]):
    child = os.fork()
    if child == 0:
        checkpoints = Checkpoints(folder, keep=2)
        while True:
            step += 1
            checkpoints.save(state(step, rows=20_000), RECORD)
    while not list(folder.glob("checkpoint-*.orbax-checkpoint-tmp*")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(*sorted(path.name for path in folder.iterdir()))
    step += 100
"""


def test_kill_9_in_the_middle_of_a_save_leaves_only_complete_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 0)
    delays = (0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08)
    listings = [line.split() for line in run_script(KILLS, tmp_path, *delays).splitlines()]
    assert len(listings) == len(delays)
    for listing in listings:
        assert any(name.removeprefix("checkpoint-").isdecimal() for name in listing), "no checkpoint was left"

    reader = Checkpoints(tmp_path, keep=None, read_only=True)
    found = checkpoints_in(tmp_path)
    assert [path.name for path in found] == [f"checkpoint-{step}" for step in reader.steps()]
    for step in reader.steps():
        rows = 20_000 if step else 4
        assert reader.record(step) == RECORD
        assert_same(reader.restore(step, state(0, rows)), state(step, rows))
    reader.close()

    save(tmp_path, 5000, keep=1)
    assert names_in(tmp_path) == ["checkpoint-5000"], "what the kills left behind stays for ever"


# A folder of its own for every kill, which is at one rename or deletion later each time.
KILLED_WHILE_REPLACING = """
import os, shutil, signal, sys
from itertools import count
from pathlib import Path
from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints
from test_orbax_checkpoints import RECORD, another_of_step_3

for number in count():
    folder, left = Path(shutil.copytree(sys.argv[1], f"{sys.argv[1]}-{number}")), [number]
    child = os.fork()
    if child == 0:
        for name in ("rename", "replace", "rmdir", "unlink"):
            def change(*arguments, really=getattr(os, name), **options):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return really(*arguments, **options)
            setattr(os, name, change)
        checkpoints = Checkpoints(folder, keep=None)
        checkpoints.save(another_of_step_3(), RECORD)
        checkpoints.close()
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def another_of_step_3() -> TrainState:
    return state(9)._replace(step=np.array(3, np.int32))


def test_kill_9_while_a_step_is_saved_again_leaves_one_of_that_step(tmp_path: Path) -> None:
    save(tmp_path / "run", 2, 3)
    run_script(KILLED_WHILE_REPLACING, tmp_path / "run")
    runs = sorted(tmp_path.glob("run-*"), key=lambda path: int(path.name.removeprefix("run-")))
    assert len(runs) > 8, "it was hardly ever killed"
    assert any(not (run / "checkpoint-3").exists() for run in runs), "it was never killed between the two names"
    left = []
    for run in runs:
        tidy(run)
        assert checkpoint_to_resume(run, "latest") == run / "checkpoint-3"
        assert examine(run / "checkpoint-3") == Verdict(True, ())
        reader = Checkpoints(run, keep=None, read_only=True)
        restored = reader.restore(3, state(0))
        reader.close()
        left.append(restored.params["scale"] == another_of_step_3().params["scale"])
        assert_same(restored, another_of_step_3() if left[-1] else state(3))
        save(run, 4)
        assert names_in(run) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"], "what the kill left stays for ever"
    assert left == sorted(left)
    assert set(left) == {False, True}


KILLED_WHILE_DELETING = """
import os, signal, sys
from pathlib import Path
from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints
from test_orbax_checkpoints import RECORD, state

if os.fork() > 0:
    os.wait()
    sys.exit()
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
for step in (1, 2):
    checkpoints.save(state(step), RECORD)
checkpoints.wait()
unlink = os.unlink

def unlink_and_die(*arguments, **options):
    unlink(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

os.unlink = unlink_and_die
checkpoints.save(state(3), RECORD)
checkpoints.close()
"""


def test_kill_9_while_an_old_checkpoint_is_deleted_leaves_no_half_of_it(tmp_path: Path) -> None:
    run_script(KILLED_WHILE_DELETING, tmp_path)
    assert (tmp_path / "checkpoint-1.deleted.unfinished").exists(), "nothing was killed while it was deleting"
    assert not (tmp_path / "checkpoint-1").exists()
    save(tmp_path, 4, keep=2)
    assert names_in(tmp_path) == ["checkpoint-3", "checkpoint-4"]


# --- a full disk -----------------------------------------------------------------------------------------------------

# A limit on the size of a file fails a write in the middle of it as a full disk does, without a disk to fill.
FULL_DISK = """
import json, resource, sys
from pathlib import Path
from flax_trainer.checkpoints.orbax_checkpoints import Checkpoints
from test_orbax_checkpoints import RECORD, save, state

folder, failing_call = Path(sys.argv[1]), sys.argv[2]
save(folder, 1, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
checkpoints = Checkpoints(folder, keep=2)
checkpoints.save(state(3, rows=20_000), RECORD)
try:
    checkpoints.save(state(4), RECORD) if failing_call == "save" else getattr(checkpoints, failing_call)()
    print("nothing was raised")
except ValueError as error:
    print(error)
checkpoints.close()
"""


@pytest.mark.parametrize("failing_call", ["wait", "save", "close"])
def test_a_full_disk_leaves_the_older_checkpoints_intact(tmp_path: Path, failing_call: str) -> None:
    message = run_script(FULL_DISK, tmp_path, failing_call)
    assert message.startswith(f"A checkpoint could not be written to {tmp_path} (")
    assert "File too large" in message
    assert "Complete checkpoints there: checkpoint-1, checkpoint-2." in message
    assert "--resume_from_checkpoint latest" in message

    left = set(names_in(tmp_path))
    assert {"checkpoint-1", "checkpoint-2"} < left, "the failed save left no trace: the next line proves nothing"
    assert checkpoint_to_resume(tmp_path, "latest") == tmp_path / "checkpoint-2"
    checkpoints = Checkpoints(tmp_path, keep=None)
    for step in (1, 2):
        assert_same(checkpoints.restore(step, state(0)), state(step))
    checkpoints.save(state(3), RECORD)
    checkpoints.close()
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_the_state_is_what_a_checkpoint_holds() -> None:
    saved: dict[str, Any] = state(3).to_checkpoint()
    assert_same(TrainState.from_checkpoint(saved), state(3))
    assert set(saved) == {"step", "params", "mu", "nu"}


def test_moments_in_eight_bits_are_kept_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    trees = [{"weight": rng.random((80, 64), np.float32), "bias": rng.random(64, np.float32)} for _ in range(3)]
    state = TrainState(np.array(3, np.int32), *trees, non_finite=np.array(False)).with_moments_in_eight_bits()
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(state, RECORD)
    checkpoints.wait()
    assert_same(checkpoints.restore(3, TrainState.create(trees[0], eight_bits=True)), state)
    with pytest.raises(ValueError, match=r"checkpoint-3 was saved with --use_8bit_adam.*Add that flag"):
        checkpoints.restore(3, TrainState.create(trees[0]))
    checkpoints.close()


def test_a_new_state_has_no_moments_yet() -> None:
    new = TrainState.create(params(5))
    assert (new.step.dtype, int(new.step), bool(new.non_finite)) == (np.int32, 0, False)
    assert new.params.keys() == new.mu.keys() == new.nu.keys()
    assert not any(np.any(moment) for moment in [*new.mu.values(), *new.nu.values()])
    assert new.mu["conv_in.bias"] is not new.nu["conv_in.bias"]


def test_writes_that_were_given_up_end_in_silence_even_later(tmp_path: Path) -> None:
    """Their errors come from threads that nobody waits for; what else goes wrong where nobody can catch it is told."""

    class Ended:
        def __init__(self, message: str):
            self.message = message

        def __del__(self) -> None:
            raise RuntimeError(self.message)

    told: list[str] = []
    before = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: told.append(str(unraisable.exc_value))
    try:
        save(tmp_path, 3)
        Ended("Event loop is closed")
        Ended("something else")
    finally:
        sys.unraisablehook = before
    assert told == ["something else"]
