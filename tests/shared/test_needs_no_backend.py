"""What both backends share needs neither of them. `test_training_run.py` trains in Flax without torch and diffusers."""

import subprocess
import sys

from tests.end_to_end.support.running import PROJECT


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


def test_drawing_in_flax_imports_no_torch() -> None:
    """A TPU VM has neither torch nor diffusers."""
    code = """
import sys
for name in ("torch", "diffusers", "accelerate"):
    sys.modules[name] = None
import flax_trainer.generate, flax_trainer.pipeline
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_mistakes_in_flags_wait_for_no_library() -> None:
    """Nor does --help, of the commands that draw and measure."""
    code = """
import sys
for name in ("numpy", "PIL", "numba", "transformers", "huggingface_hub", "torch", "jax"):
    sys.modules[name] = None
import flax_trainer.evaluate, flax_trainer.generate, torch_trainer.evaluate, torch_trainer.generate
for command in (flax_trainer.evaluate, flax_trainer.generate, torch_trainer.evaluate, torch_trainer.generate):
    assert command.main(["--help"]) == 0
    assert command.main(["--seed", "-1"]) == 2
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
