"""Objects at addresses, read within bounds and through faults: in ranges, several at once, or ahead of their reader."""

from shared.data.remote.faults import AbsentError, RemoteError
from shared.data.remote.identity import Identity
from shared.data.remote.objects import RemoteObject, open_object
from shared.data.remote.read_ahead import Readers, RemoteStream, RemoteStreams

__all__ = [
    "AbsentError",
    "Identity",
    "Readers",
    "RemoteError",
    "RemoteObject",
    "RemoteStream",
    "RemoteStreams",
    "open_object",
]
