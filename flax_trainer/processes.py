"""Several processes that train together, one per host: how they find each other, agree, and part.

Whatever is asked of all processes is asked by an operation on their devices, in the order of the program, so all of
them have to come by.
"""

import dataclasses
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shared.config import TrainConfig
from shared.config.options import FLAGS, SECRETS

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_SECONDS_FOR_METADATA = 5
_SECONDS_FOR_SHUTDOWN = 60
_OF_ONE_START = ("coordinator_address", "num_processes", "process_id", "local_rank")


# --- finding each other ----------------------------------------------------------------------------------------------


def join_processes(config: TrainConfig) -> None:
    """Make the processes of a run one program, before anything touches a device: as flags say, or the TPU's hosts.

    Raises:
        ValueError: the others cannot be reached.
    """
    if config.coordinator_address is not None:
        _initialize(config.coordinator_address, config.num_processes, config.process_id)
    elif _is_one_tpu_host_of_several():
        _initialize()


def without_processes(config: TrainConfig) -> TrainConfig:
    """The configuration as it holds wherever the run is started next."""
    return dataclasses.replace(config, **{name: FLAGS[name].default for name in _OF_ONE_START})


def check_joined() -> None:
    """Raises ValueError where this host is one of several that do not know of each other. Touches the devices."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"This host's devices belong to {jax.process_count()} hosts, but how these find each other is not known: "
            "the machine's metadata could not be read. Say it with --coordinator_address, --num_processes and "
            "--process_id."
        )


def _initialize(address: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    # Its own handler of SIGTERM would take the place of ours, and knows nothing of Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(address, processes, process, shutdown_timeout_seconds=_SECONDS_FOR_SHUTDOWN)
    except RuntimeError as error:
        raise ValueError(
            f"The processes of the run did not find each other ({str(error).splitlines()[0]}). Start the same command "
            "on every host, at about the same time; --coordinator_address is a free port of the host of process 0 that "
            "all others reach."
        ) from error


def _is_one_tpu_host_of_several() -> bool:
    """Whether the environment (GKE) or the metadata server (Compute Engine) names other hosts of this TPU.

    Single hosts are left alone: `jax.distributed.initialize` would ask them for a coordinator they may not have.
    """
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    if "tpu" not in (platforms or "").split(","):  # JAX says so by itself where TPU chips are
        return False
    if int(os.environ.get("MEGASCALE_NUM_SLICES", "1")) > 1:
        return True
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if hosts is None and "TPU_SKIP_MDS_QUERY" not in os.environ:
        hosts = _metadata("worker-network-endpoints")
        if re.search(r"^MEGASCALE_NUM_SLICES: *'?0*([2-9]|1\d)", _metadata("tpu-env"), re.MULTILINE):
            return True
    return "," in (hosts or "")


def _metadata(key: str) -> str:
    """An attribute of this machine; empty where it has none, or no metadata server."""
    request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with directly.open(request, timeout=_SECONDS_FOR_METADATA) as response:
            return response.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return ""


# --- agreeing --------------------------------------------------------------------------------------------------------


def is_main_process() -> bool:
    """Whether this is the one that writes and reports."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set in at least one process."""
    if not jax.distributed.is_initialized():
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def sum_over_processes(value: int) -> int:
    return int(multihost_utils.process_allgather(np.array(value, np.int32)).sum())


def wait_for_all(name: str) -> None:
    """Go on when all processes have come here."""
    if not jax.distributed.is_initialized():
        return
    multihost_utils.sync_global_devices(name)


@contextmanager
def all_or_none() -> Iterator[None]:
    """What is done in here succeeds in all processes or ends them all; it must not need the others itself.

    Raises:
        ValueError: a mistake in another process, which would leave this one waiting for it.
    """
    try:
        yield
    except ValueError:
        any_process(True)
        raise
    if any_process(False):
        raise ValueError("Another process of this run cannot start; its own output says why.")


def same_everywhere(config: TrainConfig) -> TrainConfig:
    """The configuration of process 0, apart from secrets, once all processes are found to have it too.

    The output folder is taken over: a {timestamp} in it is another one on each host.

    Raises:
        ValueError: naming the flags in which this or another process differs.
    """
    if not jax.distributed.is_initialized():
        return config
    theirs = json.loads(_text_of_main(json.dumps(_comparable(config))))
    config = dataclasses.replace(config, output_dir=theirs["output_dir"])
    with all_or_none():
        mine = json.loads(json.dumps(_comparable(config)))
        differing = [f"--{name} ({mine[name]!r}, not {theirs[name]!r})" for name in mine if mine[name] != theirs[name]]
        if differing:
            raise ValueError(
                f"Process {jax.process_index()} was started with another command than process 0: "
                f"{', '.join(differing)}. Start the same command on all hosts."
            )
    return config


def check_shared_folder(folder: Path) -> None:
    """Raises ValueError where the processes do not see the same folder: each saves its part of a checkpoint there."""
    if not jax.distributed.is_initialized():
        return
    nonce = _text_of_main(os.urandom(8).hex())
    probe = folder / f".seen-by-all-{nonce}"
    with all_or_none():
        if is_main_process():
            probe.touch()
    with all_or_none():
        if not probe.exists():
            raise ValueError(
                f"--output_dir {folder} is not the same folder on all hosts: process {jax.process_index()} does not "
                "see what process 0 wrote. Give one on a file system that they share, such as NFS or a mounted bucket."
            )
    if is_main_process():
        probe.unlink()


def _text_of_main(text: str) -> str:
    """What process 0 calls this with."""
    encoded = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(encoded), np.int32)))
    received = multihost_utils.broadcast_one_to_all(np.resize(encoded, length))
    return np.asarray(received, np.uint8).tobytes().decode()


def _comparable(config: TrainConfig) -> dict[str, object]:
    values = dataclasses.asdict(config)
    return {name: value for name, value in values.items() if name not in SECRETS and name not in _OF_ONE_START}


class CommonRequest:
    """A request to stop that reaches one process reaches all, after the same step.

    The question goes to the devices with a step and the answer is read with the figures of that step, when the next
    one is on its way: so it costs no waiting, and several processes stop one step later than one does. (JAX's own
    preemption sync point hears of SIGTERM alone.)
    """

    def __init__(self) -> None:
        self._asked: jax.Array | None = None
        if jax.process_count() > 1:
            mesh = Mesh(np.array(jax.devices()), ("devices",))
            self._sharding = NamedSharding(mesh, PartitionSpec("devices"))
            self._largest = jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def heard(self, mine: bool) -> bool:
        """To be called after every step, with this process's request; whether to stop now."""
        if jax.process_count() == 1:
            return mine
        previous = self._asked
        flags = jax.make_array_from_callback(
            (jax.device_count(),), self._sharding, lambda _: np.array([mine], np.int32)
        )
        self._asked = self._largest(flags)
        return previous is not None and bool(previous)


# --- parting ---------------------------------------------------------------------------------------------------------


def end_after_error(exit_code: int) -> int:
    """The exit code, for a single process. One of several ends at once, for at a regular end it would wait for the
    others, which may wait for it; those are stopped by JAX when they miss its heartbeats.
    """
    if not jax.distributed.is_initialized():
        return exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
