"""Is a command of the documentation one that works? Its words are given to the parser of the program that it starts.

Nothing is trained, downloaded or compiled: a program is left once it has understood its words. In the documentation `…`
stands for a training's other flags, `[--flag]` for one that may be left out, and capitals for what the reader names.
"""

import argparse
import ast
import importlib
import importlib.util
import os
import re
import runpy
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from unittest import mock

from packaging.requirements import Requirement

from shared.compare.command import read_command
from shared.config import Backend, parse_command_line
from shared.evaluate.command import read_command as read_evaluate_command
from shared.evaluate.options import EVALUATE_FLAGS
from shared.generate.command import read_command as read_generate_command
from shared.generate.options import GENERATE_FLAGS
from shared.prepare_data.cache.command import read_command as read_cache_command
from shared.prepare_data.command import SUBCOMMANDS
from shared.prepare_data.command import read_command as read_prepare_command
from shared.prepare_data.handing_on import taken_apart
from tests.docs.pages import ROOT
from tests.tpu_vm.cloud import Cloud

_BACKENDS: dict[str, Backend] = {"train_flax.py": "flax", "train_torch.py": "torch"}
_OTHERS = {"cd", "source", "uv", "pprof", "git", "trap", "wait"}  # not ours
_ENDS = {"&&", "||", ";", "|", "&"}
_ASSIGNMENT = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)

# What … stands for, with data where the command names none.
_REST = ["--pretrained_model_name_or_path=MODEL", "--validation_image=condition.png", "--validation_prompt=a circle"]
_DATA = ("--dataset_name", "--train_data_dir", "--train_shards", "--generated_circles")
# Numbers that the reader names.
_NUMBERS = {"SEED": "1", "CASES": "1", "SEED:NUMBER": "1:1", "COUNT": "1", "N": "1"}
# A configuration that a run has left.
_LEFT = {"OUTPUT_DIR/config.yaml": str(ROOT / "tests" / "docs" / "config_of_a_run.yaml")}


class Understood(Exception):
    """A program has parsed its words and would now begin to work."""


def commands(block: str) -> Iterator[list[str]]:
    """The words of every command of a block of shell, variables that it sets put in."""
    variables: dict[str, str] = {}
    for statement in _statements(block):
        for command in _split(statement):
            while command and (assignment := _ASSIGNMENT.fullmatch(command[0])):
                variables[assignment[1]] = assignment[2]
                command = command[1:]
            words = [part for word in command for part in _expanded(word, variables)]
            if words:
                yield words


def check(words: list[str]) -> None:
    """Raises AssertionError, or the SystemExit of the program itself, for a command that would not be understood."""
    program, rest = words[0], words[1:]
    if program in _CHECKS:
        _CHECKS[program](rest)
    elif program not in _OTHERS:
        raise AssertionError(f"nothing here knows how to check a command that begins with {program!r}")


def _statements(block: str) -> Iterator[list[str]]:
    pending = ""
    for line in block.replace("\\\n", " ").splitlines():
        pending += line
        lexer = shlex.shlex(pending, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        try:
            words = list(lexer)
        except ValueError:  # a quotation that goes on in the next line
            pending += "\n"
            continue
        yield words
        pending = ""
    assert not pending, f"a quotation does not end: {pending}"


def _split(words: list[str]) -> Iterator[list[str]]:
    """Commands that follow each other in one line, without what they are written to."""
    command: list[str] = []
    words = [word for before, word in zip(["", *words], words, strict=False) if ">" not in (before, word)]
    for word in [*words, ";"]:
        if word in _ENDS:
            yield command
            command = []
        else:
            command.append(word)


def _expanded(word: str, variables: dict[str, str]) -> list[str]:
    if word.startswith("$"):
        return variables[word[1:]].split()
    if word.startswith("[--"):
        return [word.removeprefix("[").removesuffix("]")]
    return [_NUMBERS.get(word, _LEFT.get(word, word))]


def _train(backend: Backend, words: list[str]) -> None:
    words = _without_ellipsis(words)
    if not words:  # the demo
        return
    try:
        parse_command_line(words, backend)
    except SystemExit as stop:
        assert stop.code == 0, f"train_{backend}.py does not understand {words}"  # noqa: PT017


def _without_ellipsis(words: list[str]) -> list[str]:
    if "…" not in words:
        return words
    data = [] if any(word.startswith(_DATA) for word in words) else ["--generated_circles=1"]
    place = words.index("…")
    return [*words[:place], *_REST, *data, *words[place + 1 :]]


def _python(words: list[str]) -> None:
    match words:
        case ["-c", code]:
            ast.parse(code)
        case ["-m", "venv", _]:
            pass
        case ["-m", module, *rest]:
            _module(module, rest)
        case [script, *rest] if script in _BACKENDS:
            _train(_BACKENDS[script], rest)
        case _:
            raise AssertionError(f"python3 does not start with {words}")


def _prepare(words: list[str]) -> None:
    if words[:1] == ["cache"]:
        options, rest = taken_apart(words[1:])
        if rest:
            read_cache_command(rest, options.backend or "flax")
    else:
        read_prepare_command(words)


def _module(name: str, words: list[str]) -> None:
    if name == "shared.compare":
        read_command(_without_ellipsis(words))
    elif name == "flax_trainer.compile_report":
        _compile_report(words)
    elif name in ("flax_trainer.generate", "torch_trainer.generate"):
        read_generate_command(words)
    elif name in ("flax_trainer.evaluate", "torch_trainer.evaluate"):
        read_evaluate_command(words)
    elif name == "shared.prepare_data":
        _prepare(words)
    else:
        _argparse(name, words)


def _compile_report(words: list[str]) -> None:
    module = importlib.import_module("flax_trainer.compile_report.__main__")
    reached = mock.Mock(side_effect=Understood)
    with mock.patch.multiple(module, in_subprocess=reached, find_batch_size=reached):
        try:
            exit_code = module.main(words)
        except Understood:
            return
    raise AssertionError(f"flax_trainer.compile_report ends with {exit_code} at {words}")


def _argparse(name: str, words: list[str]) -> None:
    """A module whose words argparse reads: it runs up to there."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"there is no module {name}"
    if spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    assert spec is not None, f"{name} cannot be started with -m"
    assert spec.origin is not None
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(self: argparse.ArgumentParser, args: list[str] | None = None) -> None:
        self.allow_abbrev = False
        parse(self, args)
        raise Understood

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_leave),
        mock.patch.object(sys, "argv", [name, *words]),
        mock.patch.dict(os.environ),
    ):
        try:
            runpy.run_path(spec.origin, run_name="__main__")
        except Understood:
            return
    raise AssertionError(f"{name} does not read its words with argparse")


def _accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    arguments = launch_command_parser().parse_args(words[1:])
    if arguments.config_file is not None:
        assert (ROOT / arguments.config_file).is_file(), arguments.config_file
    _train(_BACKENDS[arguments.training_script], arguments.training_script_args)


def _make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for word in words:
        assert "=" in word or word in targets, f"make has no target {word}"


def _pip(words: list[str]) -> None:
    assert words[0] == "install"
    rest = iter(words[1:])
    for word in rest:
        if word == "-r":
            assert (ROOT / next(rest)).is_file(), words
        else:
            Requirement(word)


def _gcloud(words: list[str]) -> None:
    if words[:2] == ["storage", "buckets"]:
        assert words[2] != "create" or "--enable-hierarchical-namespace" in words, words
        return
    assert words[:4] == ["compute", "tpus", "tpu-vm", "ssh"], words
    for word in words:
        if word.startswith("--command="):
            for command in commands(word.removeprefix("--command=")):
                check(command)


def _tpu_setup(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # in a checkout of its own: it refuses one with changes
        done = Cloud(Path(folder)).run("--dry_run", *words)
    assert done.returncode == 0, done.stderr
    if "--" in words:
        _train("flax", words[words.index("--") + 1 :])


def _sky(words: list[str]) -> None:
    assert words[:2] == ["jobs", "launch"], words
    assert (ROOT / words[2]).is_file(), words


def _with_files(words: list[str]) -> None:
    for flag, value in pairwise(words):
        if flag in ("-f", "--file"):
            assert (ROOT / value).is_file(), words


def _xpk(words: list[str]) -> None:
    for word in words:
        if word.startswith("--command="):
            script, *command = word.removeprefix("--command=exec ").split()
            assert (ROOT / script).is_file(), words
            check(command)


def _tensorboard(words: list[str]) -> None:
    assert words[:1] == ["--logdir"], words


_CHECKS: dict[str, Callable[[list[str]], None]] = {
    "python3": _python,
    ".venv/bin/python": _python,
    "accelerate": _accelerate,
    "make": _make,
    "pip": _pip,
    "gcloud": _gcloud,
    "./tpu_setup.sh": _tpu_setup,
    "tensorboard": _tensorboard,
    "sky": _sky,
    "docker": _with_files,
    "kubectl": _with_files,
    "xpk": _xpk,
}
PROGRAMS = frozenset(_CHECKS)


def known_flags() -> set[str]:
    """Every flag, with its dashes, that a page may name by itself."""
    from flax_trainer.compile_report.__main__ import OwnFlags
    from shared.config.flags import flags_of
    from shared.config.options import FLAGS

    names = {
        "help",
        "config",
        "print_config",
        *FLAGS,
        *(f"no_{name}" for name in FLAGS),
        *flags_of(OwnFlags),
        *GENERATE_FLAGS,
        *EVALUATE_FLAGS,
        *(name for subcommand in SUBCOMMANDS.values() for name in subcommand.flags),
    }
    usage = (ROOT / "tpu_setup.sh").read_text(encoding="utf-8")
    return {f"--{name}" for name in names} | set(re.findall(r"^  (--\w+)", usage, re.MULTILINE))


def existing(path: str) -> list[Path]:
    """What a path of the documentation, which may hold * and {a,b}, means in the repository."""
    return list(ROOT.glob(path.rstrip("/")))
