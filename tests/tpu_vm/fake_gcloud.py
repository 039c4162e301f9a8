"""Stands in for gcloud: keeps one VM in the folder $FAKE_CLOUD, whose hosts are folders where ssh runs its commands.

`plan.json` there says what is to happen; `calls.jsonl` says what was asked.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CLOUD = Path(os.environ["FAKE_CLOUD"])
STATE, CALLS, HOSTS = CLOUD / "state", CLOUD / "calls.jsonl", CLOUD / "hosts"
PLAN: dict[str, Any] = json.loads((CLOUD / "plan.json").read_text())


def main(arguments: list[str]) -> int:
    with CALLS.open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if arguments[:2] == ["auth", "list"]:
        print(PLAN["account"])
        return 0
    if arguments[:3] == ["storage", "buckets", "describe"]:
        print(PLAN["hierarchical_namespace"])
        return 0
    assert arguments[:3] == ["compute", "tpus", "tpu-vm"], arguments
    verb, rest = arguments[3], arguments[4:]
    assert "--zone=us-central2-b" in rest, rest
    return {"describe": describe, "create": create, "delete": delete, "scp": scp, "ssh": ssh}[verb](rest)


def describe(_: list[str]) -> int:
    if (answer := _next("describe")) is not None:
        _become(answer)
    if not STATE.exists():
        return _fail("NOT_FOUND: Resource 'projects/p/locations/us-central2-b/nodes/circles' was not found")
    if STATE.read_text() == "no answer":
        return _fail("PERMISSION_DENIED")
    print(STATE.read_text(), flush=True)
    print("Updates are available for some components.", file=sys.stderr)
    return 0


def create(_: list[str]) -> int:
    assert not STATE.exists(), "a VM of this name exists"
    if _next("create") == "fails":
        return _fail("There is no more capacity in the zone")
    for number in range(PLAN["hosts"]):
        (HOSTS / str(number)).mkdir(parents=True)
    _become("READY")
    return 0


def delete(_: list[str]) -> int:
    STATE.unlink()
    shutil.rmtree(HOSTS, ignore_errors=True)
    return 0


def scp(arguments: list[str]) -> int:
    source, target = arguments[:2]
    for host in sorted(HOSTS.iterdir()):
        shutil.copy(source, host / target.partition(":")[2])
    return 0


def ssh(arguments: list[str]) -> int:
    (command,) = (word.removeprefix("--command=") for word in arguments if word.startswith("--command="))
    if not STATE.exists() or STATE.read_text() != "READY" or _next("ssh " + _purpose(command)) == "drops":
        return _fail("[/usr/bin/ssh] exited with return code [255]")
    running = [
        subprocess.Popen(
            ["bash", "-c", command],
            cwd=host,
            env={"HOME": str(host), "PATH": os.environ["FAKE_HOST_PATH"], "FAKE_CLOUD": str(CLOUD)},
        )
        for host in sorted(HOSTS.iterdir())
    ]
    return max(process.wait() for process in running)


def _purpose(command: str) -> str:
    known = {
        "tail": "tail --lines",
        "install": "uv pip install",
        "start": "systemd-run",
        "ask": "echo training: running",
    }
    return next((purpose for purpose, words in known.items() if words in command), "other")


def _next(event: str) -> str | None:
    """What the plan says of the n-th such event."""
    counter = CLOUD / f"{event}.count"
    count = int(counter.read_text()) if counter.exists() else 0
    counter.write_text(str(count + 1))
    return PLAN["events"].get(event, {}).get(str(count))


def _become(state: str) -> None:
    if state == "gone":
        delete([])
    else:
        STATE.write_text(state)


def _fail(message: str) -> int:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    return 255 if "ssh" in message else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
