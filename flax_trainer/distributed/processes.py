"""Several processes that train together, one per host: how they find each other, agree, and part.

Whatever is asked of all processes is asked by an operation on their devices, in the order of the program, so all of
them have to come by.
"""

import dataclasses
import errno
import http.client
import ipaddress
import json
import logging
import os
import re
import socket
import sys
import urllib.request
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
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_SECONDS_FOR_METADATA = 5
_LARGEST_METADATA = 2**20  # bytes; the longest attribute lists the hosts of a pod, some 60 bytes each
_SECONDS_FOR_SHUTDOWN = 60
_OF_ONE_START = [name for name, flag in FLAGS.items() if flag.of_one_start]


# --- finding each other ----------------------------------------------------------------------------------------------


def join_processes(config: TrainConfig) -> None:
    """Make the processes of a run one program, before anything touches a device: as flags say, or the TPU's hosts.

    Raises:
        UserError: the others cannot be reached, or the port of process 0 is taken.
    """
    if config.coordinator_address is not None:
        where = _where_to_listen(config.coordinator_address) if config.process_id == 0 else None
        _initialize(config.coordinator_address, config.num_processes, config.process_id, where)
    elif _is_one_tpu_host_of_several():
        _initialize()


def without_processes(config: TrainConfig) -> TrainConfig:
    """The configuration as it holds wherever the run is started next."""
    return dataclasses.replace(config, **{name: FLAGS[name].default for name in _OF_ONE_START})


def check_joined() -> None:
    """Raises UserError where this host is one of several that do not know of each other. Touches the devices."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"This host's devices belong to {jax.process_count()} hosts, but how these find each other is not known: "
            "the machine's metadata could not be read. Say it with --coordinator_address, --num_processes and "
            "--process_id."
        )


def _where_to_listen(address: str) -> str | None:
    """The bind address for process 0: the one that the others were told, else None, for every address of the host.

    JAX by itself listens on all of them, to whoever comes.

    Raises:
        UserError: the port is taken.
    """
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:  # JAX's own way of saying it
        return None
    host, _, port = address.rpartition(":")
    for family, place in _addresses(host.strip("[]"), int(port)):
        if _is_of_this_host(family, place) and _means_the_same_elsewhere(host, place[0]):
            return f"[{place[0]}]:{port}" if family == socket.AF_INET6 else f"{place[0]}:{port}"
    logger.warning(
        "--coordinator_address %s is not an address that this host has (but a forwarded one, or a name that means "
        "another host elsewhere): process 0 listens on port %s of all its addresses; keep strangers from it",
        shown(address),
        port,
    )
    return None


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # unknown, or no name at all: JAX will say that nobody can be reached there
        return []
    return [(family, place) for family, _, _, _, place in found]


def _is_of_this_host(family: socket.AddressFamily, place: Any) -> bool:
    """Raises UserError where the port is taken, which JAX would find out in five minutes."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the service, not stopped by closed ones
            probe.bind(place)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(
                f"--coordinator_address: process 0 cannot listen on port {place[1]} of {place[0]} ({error.strerror}). "
                "Give all processes another port, such as 8476."
            ) from error
        return False
    return True


def _means_the_same_elsewhere(host: str, number: str) -> bool:
    """Many hosts know their own name as 127.0.1.1, where nobody else would find them."""
    is_loopback = ipaddress.ip_address(number.partition("%")[0]).is_loopback
    return not is_loopback or host.strip("[]") in (number, "localhost")


def _initialize(
    address: str | None = None, processes: int | None = None, process: int | None = None, where: str | None = None
) -> None:
    # Its own handler of SIGTERM would take the place of ours, and knows nothing of Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            processes,
            process,
            shutdown_timeout_seconds=_SECONDS_FOR_SHUTDOWN,
            coordinator_bind_address=where,
        )
    except RuntimeError as error:
        raise UserError(
            f"The processes of the run did not find each other ({shown(_first_line(error))}). Start the same command "
            "on every host, at about the same time; --coordinator_address is a free port of the host of process 0 that "
            "all others reach."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


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
            return response.read(_LARGEST_METADATA).decode(errors="replace")
    except (OSError, http.client.HTTPException):
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


class StopRequest:
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

    def poll(self, mine: bool) -> bool:
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
