"""A cloud that is none for tests of tpu_setup.sh: a gcloud that keeps a folder, and a checkout to call it from."""

import atexit
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
PROGRAMS = (
    *("bash", "cat", "dirname", "git", "grep", "gzip", "head", "id", "ln", "mkdir", "rm", "sed", "sh", "sleep"),
    *("sort", "tail", "tar"),
)
OF_HOSTS = ("apt-get", "curl", "findmnt", "ls", "python", "sudo", "systemctl", "systemd-run", "uv")


class Cloud:
    """The fake cloud, and a checkout that uses it."""

    def __init__(self, folder: Path):
        self.folder = folder / "cloud"
        self.checkout = folder / "checkout"
        self.plan: dict[str, Any] = {
            "account": "someone@example.org",
            "hierarchical_namespace": True,
            "hosts": 1,
            "devices": 4,
            "install": "works",
            "mounted": "",
            "trainings": [{"exit": 0}],
            "trainings_end_at_once": True,
            "events": {},  # {"describe": {"1": "PREEMPTED"}}: from the second time it is asked, the VM is preempted
        }
        shutil.copytree(_template(), folder, symlinks=True, dirs_exist_ok=True)
        self.folder.mkdir()
        self._path, self._host_path = folder / "bin", folder / "host-bin"

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments, **environment) as process:
            output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        (self.folder / "plan.json").write_text(json.dumps(self.plan))
        return subprocess.Popen(
            ["bash", str(self.checkout / "tpu_setup.sh"), *arguments],
            env=self.environment() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def environment(self) -> dict[str, str]:
        return {
            "PATH": str(self._path),
            "FAKE_CLOUD": str(self.folder),
            "FAKE_HOST_PATH": str(self._host_path),
            "HOME": str(self.folder),
        }

    def without(self, program: str) -> None:
        (self._path / program).unlink()

    def add_program(self, program: str, script: str) -> None:
        (self._path / program).write_text(script)
        (self._path / program).chmod(0o755)

    def calls(self) -> list[list[str]]:
        return _lines(self.folder / "calls.jsonl")

    def verbs(self) -> list[str]:
        """What was done to the VM, with ssh told apart by what it was for."""
        purposes = {
            "tar -xzf": "install",
            "findmnt": "mount",
            "device_count": "count",
            "systemd-run": "train",
            "s/^checkpoint-": "list",
            "tail": "follow",
            "is-active": "ask",
            "systemctl stop": "stop",
        }
        return [
            next((word for sign, word in purposes.items() if sign in call[-1]), call[3])
            if call[3] == "ssh"
            else call[3]
            for call in self.calls()
            if call[0] == "compute"
        ]

    def trainings(self, host: int = 0) -> list[dict[str, Any]]:
        return _lines(self.folder / f"trainings-{host}.jsonl")

    def changes(self, host: int = 0) -> list[list[str]]:
        return _lines(self.folder / "hosts" / str(host) / "changes")

    def exists(self) -> bool:
        return (self.folder / "state").exists()

    def make_vm(self, state: str = "READY") -> None:
        (self.folder / "state").write_text(state)
        (self.folder / "hosts" / "0").mkdir(parents=True)

    def commit(self, file: str) -> None:
        (self.checkout / file).write_text("new\n")
        git(self.checkout, "add", file)
        git(self.checkout, "commit", "--quiet", "--message", file)


@functools.cache
def _template() -> Path:
    """What every cloud starts with: programs and a checkout."""
    folder = Path(tempfile.mkdtemp(prefix="tpu-setup-"))
    atexit.register(shutil.rmtree, folder)
    _programs(folder / "bin", {"gcloud": HERE / "fake_gcloud.py"})
    _programs(folder / "host-bin", dict.fromkeys(OF_HOSTS, HERE / "fake_host.py"))
    (folder / "checkout").mkdir()
    for file in ("tpu_setup.sh", "requirements_flax.txt"):
        shutil.copy(PROJECT / file, folder / "checkout")
    for command in ("init --quiet", "add .", "commit --quiet --message begun"):
        git(folder / "checkout", *command.split())
    return folder


def git(checkout: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=checkout, check=True)


def _programs(folder: Path, fakes: dict[str, Path]) -> None:
    """A folder for PATH that has nothing but these; so no real gcloud or sudo can be called by mistake."""
    folder.mkdir()
    for program in PROGRAMS:
        if (found := shutil.which(program)) is not None:
            (folder / program).symlink_to(found)
    for name, script in fakes.items():
        (folder / name).write_text(f"#!{sys.executable} -IS\n{script.read_text()}")
        (folder / name).chmod(0o755)


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
