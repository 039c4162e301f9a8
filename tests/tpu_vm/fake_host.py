"""Stands in for the programs of a TPU VM's host, by the name it is called under. What would change the machine is only
noted, in `changes` of the host's folder.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLOUD, HOME = Path(os.environ["FAKE_CLOUD"]), Path(os.environ["HOME"])
PLAN: dict[str, Any] = json.loads((CLOUD / "plan.json").read_text())
SERVICE = HOME / "service.pid"


def curl(*arguments: str) -> int:
    """The installer of uv is a script that puts it where uv's own does; anything else is empty."""
    if any("astral.sh" in word for word in arguments):
        program = shlex.quote(str(Path(sys.argv[0]).resolve().with_name("uv")))
        print(f"mkdir -p ~/.local/bin && ln -s {program} ~/.local/bin/uv")
    return 0


def uv(*arguments: str) -> int:
    _note("uv", *arguments)
    if arguments[0] == "venv":
        (Path(arguments[-1]) / "bin").mkdir(parents=True)
        (Path(arguments[-1]) / "bin" / "python").symlink_to(Path(sys.argv[0]).resolve().with_name("python"))
    return 1 if "pip" in arguments and PLAN["install"] == "fails" else 0


def sudo(*arguments: str) -> int:
    if arguments[0] in ("systemctl", "systemd-run") and "daemon-reload" not in arguments and "start" not in arguments:
        return subprocess.call(arguments)
    text = sys.stdin.read() if arguments[0] == "tee" else ""
    _note("sudo", *arguments, *([text] if text else []))
    return 0


def ls(*_: str) -> int:
    """The run's folder, by what the last training left there."""
    trainings = (CLOUD / f"trainings-{HOME.name}.jsonl").read_text().splitlines()
    print("config.yaml", *PLAN["trainings"][len(trainings) - 1].get("leaves", []), sep="\n")
    return 0


def findmnt(*_: str) -> int:
    print(PLAN["mounted"], end="")
    return 0 if PLAN["mounted"] else 1


def systemd_run(*arguments: str) -> int:
    """Starts the service under a parent of its own, which outlives this connection."""
    _note("systemd-run", *arguments)
    begin = next(index for index, word in enumerate(arguments) if not word.startswith("--"))
    SERVICE.unlink(missing_ok=True)
    supervisor = os.fork()
    if supervisor == 0:
        os.setsid()
        with open(os.devnull, "r+") as nowhere:
            for stream in range(3):
                os.dup2(nowhere.fileno(), stream)
        service = subprocess.Popen(arguments[begin:], start_new_session=True)
        SERVICE.with_suffix(".new").write_text(str(service.pid))
        SERVICE.with_suffix(".new").rename(SERVICE)
        service.wait()
        os._exit(0)
    wait_until(SERVICE.exists)
    if PLAN["trainings_end_at_once"]:
        os.waitpid(supervisor, 0)
    return 0


def systemctl(*arguments: str) -> int:
    pid = int(SERVICE.read_text()) if SERVICE.exists() else 0
    alive = pid != 0 and Path(f"/proc/{pid}").exists()
    if arguments[0] == "show":
        print(pid if alive else 0)
        return 0
    if arguments[0] == "stop":
        if alive:
            os.killpg(pid, signal.SIGTERM)
            wait_until(lambda: not Path(f"/proc/{pid}").exists())
        return 0 if alive else 5
    assert arguments[0] == "is-active"
    return 0 if alive else 3


def python(*arguments: str) -> int:
    """JAX that counts devices, or a trainer that ends as planned."""
    if arguments[0] == "-c":
        compile(arguments[1], "the check of devices", "exec")
        print("jax.device_count() =", PLAN["devices"])
        return 0
    tokens = {name: os.environ[name] for name in ("HF_TOKEN", "WANDB_API_KEY") if name in os.environ}
    with (CLOUD / f"trainings-{HOME.name}.jsonl").open("a") as trainings:
        trainings.write(json.dumps({"arguments": arguments, "folder": os.getcwd(), "tokens": tokens}) + "\n")
    number = len((CLOUD / f"trainings-{HOME.name}.jsonl").read_text().splitlines()) - 1
    training = PLAN["trainings"][number]
    print(training.get("says", "Trained."), flush=True)
    if "until" in training:
        signal.signal(signal.SIGTERM, _stop)
        wait_until((CLOUD / training["until"]).exists)
    exit_code = training["exit"]
    return exit_code[int(HOME.name)] if isinstance(exit_code, list) else exit_code


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def _stop(*_: object) -> None:
    print("Stopped by SIGTERM; continue with --resume_from_checkpoint latest", flush=True)
    sys.exit(0)


def _note(*words: str) -> None:
    with (HOME / "changes").open("a") as changes:
        changes.write(json.dumps(words) + "\n")


if __name__ == "__main__":
    name = Path(sys.argv[0]).name.replace("-", "_").replace("apt_get", "sudo")
    sys.exit(globals()[name](*sys.argv[1:]))
