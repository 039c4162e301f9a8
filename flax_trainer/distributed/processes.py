"""Several processes that train together, one per host: how they agree, and part.

Whatever is asked of all processes is asked by an operation on their devices, in the order of the program, so all of
them have to come by.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shared.config import TrainConfig
from shared.config.options import FLAGS, SECRETS
from shared.outgoing.redaction import redacted
from shared.run.requests import Requests
from shared.untrusted import shown
from shared.user_errors import UserError

_OF_ONE_START = [name for name, flag in FLAGS.items() if flag.of_one_start]


def is_main_process() -> bool:
    """Whether this is the one that writes and reports."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def are_several() -> bool:
    """Whether this is one of several processes that train together."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def any_process(flag: bool) -> bool:
    """Whether the flag is set in at least one process."""
    if not jax.distributed.is_initialized():
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def sum_over_processes(value: int) -> int:
    return int(multihost_utils.process_allgather(np.array(value, np.int32)).sum())


def every_process(value: int | None) -> list[int | None]:
    """What each process calls this with: a step, which none passes the largest int32."""
    if not jax.distributed.is_initialized():
        return [value]
    gathered = multihost_utils.process_allgather(np.array(-1 if value is None else min(value, 2**31 - 1), np.int32))
    return [None if given < 0 else int(given) for given in gathered]


def barrier(name: str) -> None:
    """Go on when all processes have come here."""
    if not jax.distributed.is_initialized():
        return
    multihost_utils.sync_global_devices(name)


@contextmanager
def agree_or_raise() -> Iterator[None]:
    """What is done in here succeeds in all processes or ends them all; it must not need the others itself.

    Raises:
        UserError: a mistake in another process, which would leave this one waiting for it.
    """
    try:
        yield
    except ValueError:
        any_process(True)
        raise
    if any_process(False):
        raise UserError("Another process of this run cannot start; its own output says why.")


def broadcast_config(config: TrainConfig) -> TrainConfig:
    """The configuration of process 0, apart from secrets, once all processes are found to have it too.

    The output folder is taken over: a {timestamp} in it is another one on each host.

    Raises:
        UserError: naming the flags in which this or another process differs.
    """
    if not jax.distributed.is_initialized():
        return config
    theirs = json.loads(_text_of_main(json.dumps(_comparable(config))))
    config = dataclasses.replace(config, output_dir=theirs["output_dir"])
    with agree_or_raise():
        mine = json.loads(json.dumps(_comparable(config)))
        differing = [
            f"--{name} ({_told(mine[name])}, not {_told(theirs[name])})" for name in mine if mine[name] != theirs[name]
        ]
        if differing:
            raise UserError(
                f"Process {jax.process_index()} was started with another command than process 0: "
                f"{', '.join(differing)}. Start the same command on all hosts."
            )
    return config


def check_shared_folder(folder: Path) -> None:
    """Raises UserError where the processes do not see the same folder: each saves its part of a checkpoint there."""
    if not jax.distributed.is_initialized():
        return
    nonce = _text_of_main(os.urandom(8).hex())
    probe = folder / f".seen-by-all-{nonce}"
    with agree_or_raise():
        if is_main_process():
            probe.touch()
    with agree_or_raise():
        if not probe.exists():
            raise UserError(
                f"--output_dir {folder} is not the same folder on all hosts: process {jax.process_index()} does not "
                "see what process 0 wrote. Give one on a file system that they share, such as NFS or a mounted bucket."
            )
    if is_main_process():
        probe.unlink()


def without_processes(config: TrainConfig) -> TrainConfig:
    """The configuration as it holds wherever the run is started next."""
    return dataclasses.replace(config, **{name: FLAGS[name].default for name in _OF_ONE_START})


def _text_of_main(text: str) -> str:
    """What process 0 calls this with."""
    encoded = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(encoded), np.int32)))
    received = multihost_utils.broadcast_one_to_all(np.resize(encoded, length))
    return np.asarray(received, np.uint8).tobytes().decode()


def _told(value: Any) -> str:
    """A flag's value for a message, which may be an address with a password or a list of them."""
    if isinstance(value, list):
        return shown([redacted(item) for item in value])
    return shown(repr(redacted(value) if isinstance(value, str) else value))


def _comparable(config: TrainConfig) -> dict[str, object]:
    values = dataclasses.asdict(config)
    return {name: value for name, value in values.items() if name not in SECRETS and name not in _OF_ONE_START}


class JointRequests:
    """What is asked of one process is heard by all, after the same step.

    The question goes to the devices with a step and the answer is read with the figures of that step, when the next
    one is on its way: so it costs no waiting, and several processes do it one step later than one does. (JAX's own
    preemption sync point hears of SIGTERM alone.)
    """

    def __init__(self) -> None:
        self._asked: jax.Array | None = None
        if jax.process_count() > 1:
            mesh = Mesh(np.array(jax.devices()), ("devices",))
            self._sharding = NamedSharding(mesh, PartitionSpec("devices"))
            self._largest = jax.jit(lambda flags: flags.max(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def poll(self, mine: Requests) -> Requests:
        """To be called after every step, with what this process asks for; what to do now."""
        if jax.process_count() == 1:
            return mine
        previous = self._asked
        flags = jax.make_array_from_callback(
            (jax.device_count(), len(mine)), self._sharding, lambda _: np.array([mine], np.int32)
        )
        self._asked = self._largest(flags)
        return Requests() if previous is None else Requests(*map(bool, np.asarray(previous)))


def end_after_error(exit_code: int) -> int:
    """The exit code, for a single process. One of several ends at once, for at a regular end it would wait for the
    others, which may wait for it; those are stopped by JAX when they miss its heartbeats.
    """
    if not jax.distributed.is_initialized():
        return exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
