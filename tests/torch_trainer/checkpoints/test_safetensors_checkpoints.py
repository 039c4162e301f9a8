"""Checkpoints of the PyTorch backend on a real disk: complete or absent, whatever happens to process, disk or files."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import ControlNetModel
from safetensors.torch import load_file

from shared.checkpoints import policy
from shared.checkpoints.choice import checkpoint_to_resume
from shared.checkpoints.completing import tidy
from shared.checkpoints.digests import DIGESTS_FILE, Verdict, examine, write_digests
from shared.checkpoints.policy import check_resumable, checkpoint_record, checkpoints_in
from shared.checkpoints.retention import is_timed
from shared.config import TrainConfig
from tests.torch_trainer.tiny_training import ROOT, Training, batch_of, training_of
from torch_trainer.checkpoints.safetensors_checkpoints import Checkpoints, checkpoint_record_of, save_model
from torch_trainer.distributed.trainable_state import StateTensors, Tensors

RECORD = checkpoint_record(
    TrainConfig(pretrained_model_name_or_path="some/model"), {"location": ["a.tar"], "samples": 8}, 8
)
FILES = [
    "controlnet/config.json",
    "controlnet/diffusion_pytorch_model.safetensors",
    "optimizer.safetensors",
    "training_state.json",
]


# --- a state that needs no training ----------------------------------------------------------------------------------


def small_controlnet(width: int = 8) -> ControlNetModel:
    return ControlNetModel(
        block_out_channels=(width,),
        down_block_types=("DownBlock2D",),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8),
    )


class NumbersOfAStep:
    """A state that is a function of its step, so that whoever reads a checkpoint knows what belongs there."""

    is_divided = False

    def __init__(self, controlnet: torch.nn.Module):
        self._shapes = {name: tuple(param.shape) for name, param in controlnet.named_parameters()}
        self.step = 0
        self.loaded: tuple[StateTensors, int] | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def params(self) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(self.step)
        return {name: torch.randn(shape, generator=random) for name, shape in self._shapes.items()}

    def tensors(self, memory: Tensors | None = None) -> StateTensors:
        params = self.params()
        return StateTensors(
            params, {name: {"exp_avg": value + 1, "exp_avg_sq": value + 2} for name, value in params.items()}
        )

    def load(self, tensors: StateTensors, step: int) -> None:
        self.loaded = tensors, step


class Folder:
    """A run folder, and a run that saves to it."""

    def __init__(self, directory: Path, keep: int | None = None, width: int = 8):
        controlnet = small_controlnet(width)
        self.directory, self.state = directory, NumbersOfAStep(controlnet)
        self.checkpoints = Checkpoints(Accelerator(cpu=True), controlnet, self.state, directory, keep)

    def save(self, *steps: int) -> "Folder":
        for step in steps:
            self.state.step = step
            self.checkpoints.save(step, RECORD)
            self.checkpoints.wait()
        return self

    def assert_whole(self, step: int) -> None:
        """checkpoint-{step} restores to the numbers of that step, bit for bit."""
        checkpoint = self.directory / f"checkpoint-{step}"
        self.checkpoints.restore(checkpoint)
        assert self.state.loaded is not None
        tensors, restored_step = self.state.loaded
        self.state.step = step
        assert restored_step == step
        assert_same(tensors, self.state.tensors())
        assert checkpoint_record_of(checkpoint) == RECORD


def assert_same(given: StateTensors, expected: StateTensors) -> None:
    """Names, types and bits."""
    assert given.params.keys() == expected.params.keys() == given.optimizer.keys() == expected.optimizer.keys()
    for name, value in expected.params.items():
        assert given.params[name].dtype == value.dtype
        assert torch.equal(given.params[name], value), name
        assert given.optimizer[name].keys() == expected.optimizer[name].keys()
        for kind, moment in expected.optimizer[name].items():
            assert given.optimizer[name][kind].dtype == moment.dtype
            assert torch.equal(given.optimizer[name][kind], moment), (kind, name)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_script(script: str, *arguments: object) -> str:
    """Run Python in a process of its own; it must end well. Returns what it printed."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


# --- there and back --------------------------------------------------------------------------------------------------


def checkpoints_of(training: Training, directory: Path) -> Checkpoints:
    return Checkpoints(training.accelerator, training.models.controlnet, training.state, directory, None)


def save(training: Training, directory: Path, step: int) -> None:
    checkpoints = checkpoints_of(training, directory)
    checkpoints.save(step, RECORD)
    checkpoints.wait()


def memory_orders(training: Training) -> list[dict[str, tuple[int, ...]]]:
    """Strides of every parameter's state: 8-bit AdamW's kernels on GPUs go through memory, not through indices."""
    return [
        {kind: value.stride() for kind, value in training.optimizer.state[param].items() if torch.is_tensor(value)}
        for param in training.controlnet.parameters()
    ]


@pytest.mark.parametrize("use_8bit_adam", [False, True])
def test_a_restored_training_goes_on_bit_for_bit(base_model: Path, tmp_path: Path, use_8bit_adam: bool) -> None:
    training = training_of(base_model, use_8bit_adam=use_8bit_adam)
    for seed in range(2):
        training.step(batch_of(2, seed), 1e-3)
    checkpoints = checkpoints_of(training, tmp_path)
    checkpoints.save(2, RECORD)
    uninterrupted = [training.step(batch_of(2, seed), 1e-3) for seed in (2, 3)]  # while it is written
    checkpoints.wait()

    again = training_of(base_model, awake=False, use_8bit_adam=use_8bit_adam)
    checkpoints_of(again, tmp_path).restore(tmp_path / "checkpoint-2")
    assert [again.step(batch_of(2, seed), 1e-3) for seed in (2, 3)] == uninterrupted
    assert_same(again.state.tensors(), training.state.tensors())
    assert {int(kinds["step"]) for kinds in again.optimizer.state.values()} == {4}
    assert memory_orders(again) == memory_orders(training)


def test_a_restored_run_may_have_other_settings(base_model: Path, tmp_path: Path) -> None:
    """Those of AdamW are flags, and may change between the parts of a run."""
    training = training_of(base_model)
    training.step(batch_of(2), 1e-3)
    save(training, tmp_path, 1)
    again = training_of(base_model, adam_weight_decay=0.5, adam_beta1=0.7)
    checkpoints_of(again, tmp_path).restore(tmp_path / "checkpoint-1")
    (group,) = again.optimizer.param_groups
    assert group["weight_decay"] == 0.5
    assert group["betas"] == (0.7, 0.999)


def test_numbers_that_are_none_come_back_too(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    special = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, -float("inf"), 1.0, 2.0, 3.0])
    tensors = folder.state.tensors()
    tensors.params["conv_in.bias"] = special
    folder.state.tensors = lambda memory=None: tensors  # type: ignore[method-assign]
    folder.checkpoints.save(3, RECORD)
    folder.checkpoints.wait()
    folder.checkpoints.restore(tmp_path / "checkpoint-3")
    assert folder.state.loaded is not None
    restored = folder.state.loaded[0].params["conv_in.bias"]
    assert restored.numpy().tobytes() == special.numpy().tobytes()


def test_the_loss_scaler_comes_back(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    accelerator = folder.checkpoints._accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
    accelerator.scaler.scale(torch.ones(()))  # it has no scale before the first loss
    folder.save(1)
    accelerator.scaler.update(new_scale=4.0)
    folder.checkpoints.restore(tmp_path / "checkpoint-1")
    assert accelerator.scaler.get_scale() == 2.0**9
    accelerator.scaler = None
    folder.assert_whole(1)


def test_the_record_comes_back_and_lets_the_run_go_on(tmp_path: Path) -> None:
    Folder(tmp_path).save(3)
    check_resumable(tmp_path / "checkpoint-3", checkpoint_record_of(tmp_path / "checkpoint-3"), RECORD)


# --- what is in the folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_8bit_adam", [False, True])
def test_a_checkpoint_holds_numbers_and_no_pickles(base_model: Path, tmp_path: Path, use_8bit_adam: bool) -> None:
    training = training_of(base_model, use_8bit_adam=use_8bit_adam)
    training.step(batch_of(2), 1e-3)
    save(training, tmp_path, 1)
    found = [path for path in (tmp_path / "checkpoint-1").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "checkpoint-1").as_posix() for path in found} == {*FILES, DIGESTS_FILE}
    for path in found:
        json.loads(path.read_bytes()) if path.suffix == ".json" else load_file(path)


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path: Path) -> None:
    """The safetensors library makes files for their owner's eyes only, which a shared disk has no use for."""
    Folder(tmp_path).save(1)
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {(tmp_path / "checkpoint-1" / file).stat().st_mode for file in FILES} == {usual}


def test_the_controlnet_loads_in_diffusers(base_model: Path, tmp_path: Path) -> None:
    training = training_of(base_model)
    training.step(batch_of(2), 1e-3)
    save(training, tmp_path, 1)
    loaded, info = ControlNetModel.from_pretrained(
        tmp_path / "checkpoint-1", subfolder="controlnet", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.block_out_channels == training.controlnet.config.block_out_channels
    for name, param in training.controlnet.named_parameters():
        assert torch.equal(loaded.state_dict()[name], param), name


def test_a_model_that_holds_something_else_is_saved_whole(tmp_path: Path) -> None:
    """FSDP makes the model another class and its parameters parts; a checkpoint is of the whole."""

    class FSDPControlNetModel(ControlNetModel):
        pass

    model, whole = small_controlnet(), small_controlnet()
    model.__class__ = FSDPControlNetModel
    save_model(tmp_path, model, ControlNetModel, {name: param.detach() for name, param in whole.named_parameters()})
    loaded = ControlNetModel.from_pretrained(tmp_path)
    assert tuple(loaded.config.block_out_channels) == whole.config.block_out_channels
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "ControlNetModel"
    for name, param in whole.named_parameters():
        assert torch.equal(loaded.state_dict()[name], param)
    assert not torch.equal(loaded.state_dict()["conv_in.weight"], model.state_dict()["conv_in.weight"])


# --- names and retention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "left"), [(1, [90]), (2, [80, 90]), (None, [60, 70, 80, 90])])
def test_the_newest_are_kept(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    Folder(tmp_path, keep).save(60, 70, 80, 90)
    assert names_in(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_retention_counts_those_of_the_run_before(tmp_path: Path) -> None:
    Folder(tmp_path).save(8, 9, 10)
    Folder(tmp_path, keep=2).save(11).assert_whole(10)
    assert names_in(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_a_step_is_saved_again(tmp_path: Path) -> None:
    """By a run that was resumed from an older checkpoint."""
    Folder(tmp_path).save(3, 6)
    (tmp_path / "checkpoint-3" / "stale").touch()
    again = Folder(tmp_path).save(3)
    assert not (tmp_path / "checkpoint-3" / "stale").exists()
    shutil.rmtree(tmp_path / "checkpoint-6")
    again.save(6, 6).assert_whole(3)
    again.assert_whole(6)


def test_a_step_is_not_written_twice_by_one_run(tmp_path: Path) -> None:
    """Neither what it has saved nor what it goes on from."""
    folder = Folder(tmp_path).save(3)
    (tmp_path / "checkpoint-3" / "mark").touch()
    folder.save(3)
    assert (tmp_path / "checkpoint-3" / "mark").exists()
    resumed = Folder(tmp_path)
    resumed.checkpoints.restore(tmp_path / "checkpoint-3")
    resumed.save(3)
    assert (tmp_path / "checkpoint-3" / "mark").exists()
    elsewhere = Folder(tmp_path / "elsewhere")
    elsewhere.checkpoints.restore(tmp_path / "checkpoint-3")
    elsewhere.save(3).assert_whole(3)


def test_other_files_of_the_run_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "validation" / "step-3").mkdir(parents=True)
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoint-9.abandoned").mkdir()
    Folder(tmp_path, keep=1).save(3, 6)
    assert names_in(tmp_path) == ["checkpoint-6", "checkpoint-9.abandoned", "config.yaml", "validation"]


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = tmp_path / "checkpoint-9.unfinished"
    unfinished.mkdir()
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda _: False))
    Folder(tmp_path, keep=1).save(1, 2)
    assert names_in(tmp_path) == [unfinished.name]


@pytest.mark.parametrize("keep", [None, 2])
def test_a_timed_one_goes_when_a_newer_one_is_complete(tmp_path: Path, keep: int | None) -> None:
    folder = Folder(tmp_path, keep).save(1, 2)
    for step in (3, 5):
        folder.state.step = step
        folder.checkpoints.save(step, RECORD, timed=True)
        folder.checkpoints.wait()
        assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-2", f"checkpoint-{step}"]
        assert is_timed(tmp_path / f"checkpoint-{step}")
        assert examine(tmp_path / f"checkpoint-{step}") == Verdict(True, ())
        folder.assert_whole(step)
    Folder(tmp_path, keep).save(6)
    left = [1, 2, 6] if keep is None else [2, 6]
    assert names_in(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_one_is_written_at_a_time_and_its_failure_is_raised_by_whoever_is_next(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    (tmp_path / "checkpoint-2.unfinished").write_text("a file in the way")
    folder.checkpoints.save(2, RECORD)
    with pytest.raises(ValueError, match="could not be written"):
        folder.checkpoints.save(3, RECORD)
    folder.checkpoints.wait()
    assert names_in(tmp_path) == ["checkpoint-2.unfinished"]


# --- what is wrong, told plainly -------------------------------------------------------------------------------------


def test_a_controlnet_of_another_architecture_is_refused(tmp_path: Path) -> None:
    Folder(tmp_path).save(3)
    other = Folder(tmp_path, width=12)
    with pytest.raises(ValueError, match=r"checkpoint-3 belongs to a ControlNet of another architecture") as refused:
        other.checkpoints.restore(tmp_path / "checkpoint-3")
    assert "controlnet_cond_embedding.conv_out.bias: float32 [8] in the checkpoint, float32 [12] expected" in str(
        refused.value
    )
    assert len(str(refused.value)) < 1000
    assert other.state.loaded is None


@pytest.mark.parametrize("saved_with", [False, True])
def test_moments_of_the_other_optimizer_are_refused(base_model: Path, tmp_path: Path, saved_with: bool) -> None:
    training = training_of(base_model, use_8bit_adam=saved_with)
    training.step(batch_of(2), 1e-3)
    save(training, tmp_path, 1)
    other = training_of(base_model, use_8bit_adam=not saved_with)
    before = other.state.params()
    told = r"saved with --use_8bit_adam.* Add that flag" if saved_with else r"without --use_8bit_adam.* Leave out that"
    with pytest.raises(ValueError, match=told):
        checkpoints_of(other, tmp_path).restore(tmp_path / "checkpoint-1")
    assert all(torch.equal(value, before[name]) for name, value in other.state.params().items())


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Folder]:
    """Two checkpoints, of which the second is to be broken; the first must survive that."""
    folder = Folder(tmp_path).save(3, 6)
    yield folder
    folder.assert_whole(3)


@pytest.mark.parametrize("file", FILES[1:])
@pytest.mark.parametrize("left", ["nothing", "a bit", "half", "all but the end", "no file"])
def test_damaged_files_are_found_and_named(damaged: Folder, file: str, left: str) -> None:
    checkpoint = damaged.directory / "checkpoint-6"
    path = checkpoint / file
    if left == "no file":
        path.unlink()
    else:
        size = path.stat().st_size
        os.truncate(path, {"nothing": 0, "a bit": 5, "half": size // 2, "all but the end": size - 2}[left])
    with pytest.raises(ValueError, match="checkpoint-6") as refused:
        damaged.checkpoints.restore(checkpoint)
    assert path.parent.name in str(refused.value)
    assert damaged.state.loaded is None


def test_one_flipped_bit_in_any_file_is_found_and_named(damaged: Folder) -> None:
    run = damaged.directory
    for file in (*FILES, DIGESTS_FILE):
        path = run / "checkpoint-6" / file
        content = path.read_bytes()
        flipped = content[len(content) // 2] ^ 1
        path.write_bytes(content[: len(content) // 2] + bytes([flipped]) + content[len(content) // 2 + 1 :])
        assert checkpoint_to_resume(run, "latest") == run / "checkpoint-3"
        with pytest.raises(ValueError, match=rf"checkpoint-6 is damaged: .*{file}"):
            checkpoint_to_resume(run, "checkpoint-6")
        path.write_bytes(content)
    assert checkpoint_to_resume(run, "latest") == run / "checkpoint-6"


def test_a_controlnet_that_is_gone_is_named(damaged: Folder) -> None:
    checkpoint = damaged.directory / "checkpoint-6"
    shutil.rmtree(checkpoint / "controlnet")
    with pytest.raises(ValueError, match=r"checkpoint-6/controlnet"):
        damaged.checkpoints.restore(checkpoint)


def test_a_checkpoint_of_diffusers_own_script_is_refused(tmp_path: Path) -> None:
    small_controlnet().save_pretrained(tmp_path / "checkpoint-500" / "controlnet")
    (tmp_path / "checkpoint-500" / "optimizer.bin").write_bytes(b"PK")
    assert checkpoint_to_resume(tmp_path, "latest") == tmp_path / "checkpoint-500"
    with pytest.raises(ValueError, match=r"checkpoint-500/training_state.json cannot be read"):
        checkpoint_record_of(tmp_path / "checkpoint-500")


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def test_what_is_deleted_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it deletes must not leave half a checkpoint under a whole one's name."""
    Folder(tmp_path).save(1, 2, 3)
    deleted: list[Path] = []
    really = shutil.rmtree

    def note(path: Path) -> None:
        deleted.append(path)
        really(path)

    monkeypatch.setattr(policy.shutil, "rmtree", note)
    Folder(tmp_path, keep=2).save(3)
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert len(deleted) == 2
    assert not {path.name for path in deleted} & {"checkpoint-1", "checkpoint-3"}
    for path in deleted:
        path.mkdir()
    Folder(tmp_path)
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-3"], "what a killed run was deleting stays for ever"


# One process imports everything and starts a new run of saves for every kill: a process each would take seconds each.
KILLS = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.torch_trainer.checkpoints.test_safetensors_checkpoints import Folder

folder, step = Path(sys.argv[1]), 0
for delay in map(float, sys.argv[2:]):
    child = os.fork()
    if child == 0:
        run = Folder(folder, keep=2, width=64)
        while True:
            step += 1
            run.save(step)
    while not list(folder.glob("*.unfinished")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(*sorted(path.name for path in folder.iterdir()))
    step += 100
"""


def test_kill_9_in_the_middle_of_a_save_leaves_only_complete_checkpoints(tmp_path: Path) -> None:
    Folder(tmp_path, width=64).save(0)
    delays = (0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08)
    listings = [line.split() for line in run_script(KILLS, tmp_path, *delays).splitlines()]
    assert len(listings) == len(delays)
    assert any(name.endswith(".unfinished") for listing in listings for name in listing), "no save was interrupted"
    for listing in listings:
        assert any(name.removeprefix("checkpoint-").isdecimal() for name in listing), "no checkpoint was left"

    resumed = Folder(tmp_path, keep=1, width=64)
    assert [tmp_path / name for name in names_in(tmp_path)] == sorted(checkpoints_in(tmp_path)), "remains of a kill"
    for checkpoint in checkpoints_in(tmp_path):
        resumed.assert_whole(int(checkpoint.name.removeprefix("checkpoint-")))
    resumed.save(5000)
    assert names_in(tmp_path) == ["checkpoint-5000"]


# A folder of its own for every kill, which is at one rename or deletion later each time.
KILLED_WHILE_REPLACING = """
import os, shutil, signal, sys
from itertools import count
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.torch_trainer.checkpoints.test_safetensors_checkpoints import Folder

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
        Folder(folder).save(3)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_kill_9_while_a_step_is_saved_again_leaves_one_of_that_step(tmp_path: Path) -> None:
    Folder(tmp_path / "run").save(2, 3)
    (tmp_path / "run" / "checkpoint-3" / "stale").touch()
    write_digests(tmp_path / "run" / "checkpoint-3")
    run_script(KILLED_WHILE_REPLACING, tmp_path / "run")
    runs = list(tmp_path.glob("run-*"))
    assert len(runs) > 8, "it was hardly ever killed"
    assert any(not (run / "checkpoint-3").exists() for run in runs), "it was never killed between the two names"
    for run in runs:
        tidy(run)
        assert checkpoint_to_resume(run, "latest") == run / "checkpoint-3"
        assert examine(run / "checkpoint-3") == Verdict(True, ())
        resumed = Folder(run)
        resumed.assert_whole(3)
        assert names_in(run) == ["checkpoint-2", "checkpoint-3"], "what the kill left stays for ever"
    assert {(run / "checkpoint-3" / "stale").exists() for run in runs} == {False, True}


# --- a full disk -----------------------------------------------------------------------------------------------------

# A limit on the size of a file fails a write in the middle of it as a full disk does, without a disk to fill.
FULL_DISK = """
import json, resource, sys
from pathlib import Path
from tests.torch_trainer.checkpoints.test_safetensors_checkpoints import Folder

messages = {}
for name, limit in zip(sys.argv[2::2], map(int, sys.argv[3::2]), strict=True):
    folder = Folder(Path(sys.argv[1]) / name, keep=2).save(1, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    messages[name] = []
    for step in (3, 4):
        try:
            folder.save(step)
            messages[name].append("nothing was raised")
        except ValueError as error:
            messages[name].append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(messages))
"""


def test_a_full_disk_leaves_the_older_checkpoints_intact(tmp_path: Path) -> None:
    whole = Folder(tmp_path / "sizes").save(1).directory / "checkpoint-1"
    config, weights, moments, state = ((whole / file).stat().st_size for file in FILES)
    assert max(config, state) < weights < moments
    limits = {"weights": weights - 1, "moments": moments - 1}
    arguments = [argument for pair in limits.items() for argument in pair]
    messages: dict[str, list[str]] = json.loads(run_script(FULL_DISK, tmp_path, *arguments))
    assert messages.keys() == limits.keys()
    for name in limits:
        directory = tmp_path / name
        for message in messages[name]:
            assert message.startswith(f"A checkpoint could not be written to {directory} (")
            assert "File too large" in message
            assert "Complete checkpoints there: checkpoint-1, checkpoint-2." in message
            assert "--resume_from_checkpoint latest" in message
        assert checkpoint_to_resume(directory, "latest") == directory / "checkpoint-2"
        folder = Folder(directory)
        for step in (1, 2):
            folder.assert_whole(step)
        folder.save(3).assert_whole(3)
        assert names_in(directory) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = Folder(tmp_path).save(1)
    (tmp_path / "checkpoint-2.unfinished").write_text("a file in the way")
    with pytest.raises(ValueError, match=r"could not be written.*Complete checkpoints there: checkpoint-1\."):
        folder.save(2)
