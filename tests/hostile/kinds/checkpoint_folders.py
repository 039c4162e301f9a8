"""Hostile checkpoints of either backend: a run folder that holds one, and the command line that resumes it."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from shared.checkpoints.digests import DIGESTS_FILE, write_digests
from tests.hostile.case import Case
from tests.hostile.kinds import originals
from tests.hostile.mutations.binary import malicious_pickle, mutated_bytes, mutated_safetensors
from tests.hostile.mutations.places import copy_tree, displace, files_in, mutate_file, plant
from tests.hostile.mutations.values import hostile_text, mutated_json, pick, snippet, some
from tests.hostile.words import CHECKPOINT, checkpoint_words

_EXTRA_KEYS = ("step", "record", "loss_scaler", "configuration", "data", "global_batch_size", "fingerprint", "location")
_NAMES = (
    "checkpoint-٣",
    "checkpoint-0002",
    "checkpoint-02",
    "checkpoint-²",
    "checkpoint-3",
    "checkpoint-0",
    "checkpoint-99999999999999999999",
    "checkpoint-" + "9" * 200,
    "checkpoint--2",
    "checkpoint-2 ",
    "checkpoint-2\n",
    "checkpoint-2.tmp",
    "checkpoint-+2",
    "checkpoint-2_0",
)
_READ_IN_A_SECOND = 2**30
_OF_TORCH = ("optimizer.safetensors", "average.safetensors", "controlnet/diffusion_pytorch_model.safetensors")

Recipe = Callable[[Case, Path], tuple[str, Sequence[object]]]
"""Changes a copy of an honest checkpoint; what is hostile about it, in words, and further flags."""


def hostile_checkpoint(case: Case, rank: int) -> tuple[str, Sequence[str], bool]:
    """The `rank`-th: what is hostile about it, the command line, and whether it is an honest one."""
    recipe = _RECIPES[rank % len(_RECIPES)]
    backend = "torch" if recipe in _FOR_TORCH else "flax" if recipe in _FOR_FLAX else pick(case, ("flax", "torch"))
    run = case.out / "run"
    copy_tree(originals() / f"{backend}_run", run)
    what, more = recipe(case, run / CHECKPOINT)
    if recipe is not _honest:
        what += _with_digests(case, run / CHECKPOINT)
    resume = () if "--resume_from_checkpoint" in more else ("--resume_from_checkpoint", "latest")
    return f"{backend}: {what}", checkpoint_words(originals(), run, *resume, *more), recipe is _honest


def _with_digests(case: Case, checkpoint: Path) -> str:
    """Mostly by somebody who knows of them: what they would find is then for the readers behind them to find."""
    action, path = case.below(8), checkpoint / DIGESTS_FILE
    if action == 0 or checkpoint.is_symlink() or path.is_symlink() or not path.is_file():
        return ""
    if action < 3 or sum(file.stat().st_size for file in files_in(checkpoint)) > _READ_IN_A_SECOND:
        path.unlink()
        return ", without digests"
    if action == 3 and path.read_bytes()[:1] == b"{":
        _replace(path, mutated_json(case, path.read_bytes(), ("files", "sha256", "bytes", "../../outside")))
        return f", {DIGESTS_FILE} mutated"
    with suppress(OSError, ValueError):  # a pipe, a link that leads out
        write_digests(checkpoint)
    return ", with digests of that"


def _honest(case: Case, checkpoint: Path) -> tuple[str, Sequence[object]]:
    return "nothing", ()


def _any_file(case: Case, checkpoint: Path) -> tuple[str, Sequence[object]]:
    paths = some(case, files_in(checkpoint), most=3)
    return ", ".join(mutate_file(case, path, _EXTRA_KEYS) for path in paths), ()


def _json_file(case: Case, checkpoint: Path) -> tuple[str, Sequence[object]]:
    path = pick(case, [path for path in files_in(checkpoint) if path.read_bytes()[:1] == b"{"])
    _replace(path, mutated_json(case, path.read_bytes(), _EXTRA_KEYS))
    return f"{path.relative_to(checkpoint)} mutated", ()


def _record(case: Case, checkpoint: Path) -> tuple[str, Sequence[object]]:
    """What it says about the run it belongs to."""
    path = _record_file(checkpoint)
    content = json.loads(path.read_bytes())
    record = content.get("record", content) if isinstance(content, dict) else content
    action, value = case.below(5), snippet(case)
    holder: dict[str, Any] = pick(case, (record, record["configuration"], record["data"], content))
    key = pick(case, list(holder))
    if action == 0:
        del holder[key]
    elif action == 1:
        holder[hostile_text(case)] = "@@"
    else:
        holder[key] = "@@"
    _replace(path, json.dumps(content).replace('"@@"', value).encode("utf-8", "surrogatepass"))
    return f"{path.name}: {key} is {ascii(value[:60]) if action else 'missing'}", ()


def _record_file(checkpoint: Path) -> Path:
    portable = checkpoint / "training_state.json"
    return portable if portable.exists() else checkpoint / "record" / "metadata"


def _region(case: Case, checkpoint: Path) -> tuple[str, Sequence[object]]:
    """Of the files that hold numbers."""
    path = pick(case, [path for path in files_in(checkpoint) if path.read_bytes()[:1] != b"{"])
    content = path.read_bytes()
    _replace(
        path, mutated_safetensors(case, content) if path.suffix == ".safetensors" else mutated_bytes(case, content)
    )
    return f"{path.relative_to(checkpoint)} mutated", ()


def _displaced(case: Case, checkpoint: Path) -> tuple[str, Sequence[object]]:
    paths = sorted([checkpoint, *checkpoint.rglob("*")])
    return displace(case, pick(case, paths)), ()


def _renamed(case: Case, checkpoint: Path) -> tuple[str, Sequence[object]]:
    name = pick(case, _NAMES)
    if case.chance(0.5):
        copy_tree(checkpoint, checkpoint.with_name(name))
    else:
        checkpoint.rename(checkpoint.with_name(name))
    more = () if case.chance(0.6) else ("--resume_from_checkpoint", name)
    return f"it is called {name!a}", more


def _arrays(case: Case, checkpoint: Path) -> tuple[str, Sequence[object]]:
    """Whole files of other arrays than were trained."""
    path = checkpoint / pick(case, _OF_TORCH)
    arrays = load_file(path)
    names = list(arrays)
    chosen, action = pick(case, names), case.below(8)
    value = arrays[chosen]
    if action == 0:
        del arrays[chosen]
    elif action == 1:
        arrays = {
            name: array.astype(pick(case, (np.float16, np.float64, np.int8, np.bool_)))
            for name, array in arrays.items()
        }
    elif action == 2:
        arrays[chosen] = value.astype(pick(case, (np.float16, np.float64, np.int64, np.bool_)))
    elif action == 3:
        arrays[chosen] = value.reshape(-1)
    elif action == 4:
        arrays[chosen] = np.full_like(value, pick(case, (np.nan, np.inf, -1, 1e38)))
    elif action == 5:
        arrays[hostile_text(case)[:500].encode("utf-8", "replace").decode()] = arrays.pop(chosen)
    elif action == 6:
        arrays = {name: array for name, array in arrays.items() if name.startswith("exp_avg.")} or {}
    else:
        arrays["state1.conv_in.weight"] = np.zeros(4, np.uint8)
    path.unlink()
    save_file(arrays, path, metadata={"format": "pt"})
    return f"{path.name}: other arrays ({action})", ()


def _both(case: Case, checkpoint: Path) -> tuple[str, Sequence[object]]:
    """Files of both backends in one folder."""
    other = "flax" if (checkpoint / "training_state.json").exists() else "torch"
    for source in (originals() / f"{other}_run" / CHECKPOINT).iterdir():
        target = checkpoint / source.name
        if not target.exists() and case.chance(0.6):
            copy_tree(source, target) if source.is_dir() else target.hardlink_to(source)
    return "files of both backends", ()


def _planted(case: Case, checkpoint: Path) -> tuple[str, Sequence[object]]:
    """Beside it, where the run writes: links that lead out, and files that code would be read from."""
    run = checkpoint.parent
    name = pick(
        case,
        (
            "config.yaml",
            "metrics.jsonl",
            "report.json",
            "README.md",
            "logs",
            "validation",
            "checkpoint-3",
            ".lock",
            "run.lock",
        ),
    )
    what = displace(case, run / name)
    (checkpoint / "optimizer.bin").write_bytes(malicious_pickle(case))
    (checkpoint / "random_states_0.pkl").write_bytes(malicious_pickle(case))
    return f"{what}; {plant(case, run)}", ()


def _report(case: Case, checkpoint: Path) -> tuple[str, Sequence[object]]:
    """A run that may be finished."""
    honest = {"steps": 2, "global_batch_size": 2, "backend": "flax"}
    (checkpoint.parent / "report.json").write_bytes(mutated_json(case, json.dumps(honest).encode()))
    return "report.json", ("--max_train_steps", 2)


def _elsewhere(case: Case, checkpoint: Path) -> tuple[str, Sequence[object]]:
    """Named by its path, which may be anything."""
    path = case.inputs / CHECKPOINT
    if case.chance(0.5):
        checkpoint.rename(path)
        what = mutate_file(case, pick(case, files_in(path)), _EXTRA_KEYS)
    else:
        what = displace(case, path)
    return f"elsewhere: {what}", ("--resume_from_checkpoint", path)


def _replace(path: Path, content: bytes) -> None:
    path.unlink()  # a hard link to the original
    path.write_bytes(content)


_RECIPES: Sequence[Recipe] = (
    _record,
    _any_file,
    _json_file,
    _region,
    _displaced,
    _record,
    _arrays,
    _region,
    _json_file,
    _any_file,
    _renamed,
    _record,
    _displaced,
    _region,
    _json_file,
    _arrays,
    _both,
    _planted,
    _honest,
    _record,
    _report,
    _elsewhere,
    _region,
)
_FOR_TORCH = (_arrays,)
_FOR_FLAX: Sequence[Recipe] = ()
