"""How the processes of a run, one per host, find each other."""

import errno
import http.client
import ipaddress
import logging
import os
import re
import socket
import urllib.request
from typing import Any

import jax

from shared.config import TrainConfig
from shared.untrusted import shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_SECONDS_FOR_METADATA = 5
_LARGEST_METADATA = 2**20  # bytes; the longest attribute lists the hosts of a pod, some 60 bytes each
_SECONDS_FOR_SHUTDOWN = 60
# Of silence, after which a process counts as lost. The others then end, which takes them no two minutes in all.
_SECONDS_WITHOUT_HEARTBEAT = 80


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
            heartbeat_timeout_seconds=_SECONDS_WITHOUT_HEARTBEAT,
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
