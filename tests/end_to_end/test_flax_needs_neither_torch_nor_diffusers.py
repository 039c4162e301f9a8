"""A TPU VM has neither torch nor diffusers: a whole run, validation included, must do without."""

import os
import subprocess
import sys
from pathlib import Path

from shared.data.sources.circles import draw
from tests.end_to_end.support.running import PROJECT

_RUN_WITHOUT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "accelerate", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] in ("torch", "diffusers", "accelerate", "torchvision") else found(name, package)
)
import train_flax

exit_code = train_flax.main(sys.argv[1:])
assert not {"torch", "diffusers", "accelerate"} & set(sys.modules)
sys.exit(exit_code)
"""


def test_a_run_imports_neither(base_model: Path, tmp_path: Path) -> None:
    condition = tmp_path / "condition.png"
    draw(0, 64, seed=1).conditioning_image.save(condition)
    arguments = [
        *("--pretrained_model_name_or_path", str(base_model), "--generated_circles", "8", "--resolution", "64"),
        *("--train_batch_size", "8", "--max_train_steps", "1", "--checkpointing_steps", "1"),
        *("--validation_image", str(condition), "--validation_prompt", "a circle", "--num_validation_images", "2"),
        *("--output_dir", str(tmp_path / "run")),
    ]
    done = subprocess.run(
        [sys.executable, "-c", _RUN_WITHOUT, *arguments],
        cwd=PROJECT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stderr, "nobody is to think that something is missing"
    assert (tmp_path / "run" / "validation" / "step-1" / "0.png").is_file()


def test_shared_imports_neither_jax_nor_torch() -> None:
    """Every module of `shared`, in a process where importing one of them fails."""
    code = """
import importlib, pkgutil, sys
for name in ("torch", "diffusers", "jax", "flax"):
    sys.modules[name] = None
import shared
names = [module.name for module in pkgutil.walk_packages(shared.__path__, "shared.")]
for name in names:
    importlib.import_module(name)
assert len(names) > 30, names
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
