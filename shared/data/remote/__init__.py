"""Objects at addresses, read within bounds and through faults: in ranges, several at once, or ahead of their reader."""

from shared.data.remote.faults import RemoteError
from shared.data.remote.objects import RemoteObject, open_object
from shared.data.remote.read_ahead import RemoteStream, RemoteStreams

__all__ = ["RemoteError", "RemoteObject", "RemoteStream", "RemoteStreams", "open_object"]
