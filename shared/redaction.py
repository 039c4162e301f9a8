"""Addresses without what may be secret in them: for logs, checkpoints, model cards and trackers."""

import hashlib
import re

_COMMAND = re.compile(r"(?:^|[{,])pipe:", re.IGNORECASE)  # braces may expand to commands
_PROGRAM = re.compile(r"\s*([\w./~-]+)(?:\s|$)")  # and no assignment to a variable, such as TOKEN=…
# Up to the @ before the host. A password that is not escaped may hold ?, # and, where no port could stand, /.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/]*|[^/@:]*:(?!\d+/)[^@]*)@")
_QUERY = re.compile(r"(://[^?#]*)[?#].*", re.DOTALL)


def redacted(location: str) -> str:
    """The location without credentials: URLs lose user, password and query, shell commands all but the program.

    A shell command keeps a digest, so that two commands can still be told apart. Anything else stays as it is.
    """
    if command := _COMMAND.search(location):
        program = _PROGRAM.match(location, command.end())
        digest = hashlib.sha256(location.encode()).hexdigest()[:8]
        return f"pipe:{program[1] if program else ''} … (sha256 {digest})"
    return _QUERY.sub(r"\1", _CREDENTIALS.sub("", location))
