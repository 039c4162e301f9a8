"""Text without what may be secret in it: addresses for logs, checkpoints, model cards and trackers; any text on its way
out; and wrong values, which may be a token in the wrong place."""

import hashlib
import os
import re
from collections.abc import Iterable

# As URLs are read: blanks and control characters in front of the scheme do not count, tabs and line breaks nowhere.
_PIPE = r"[\t\r\n]*".join("pipe:")
_IS_COMMAND = re.compile(rf"[\x00-\x20]*{_PIPE}", re.IGNORECASE)
_COMMAND = re.compile(rf"(?:^|[{{,])[\x00-\x20]*{_PIPE}", re.IGNORECASE)  # braces may expand to commands
_PROGRAM = re.compile(r"\s*([\w./~-]+)(?:\s|$)")  # and no assignment to a variable, such as TOKEN=…
# Up to the @ before the host. A password that is not escaped may hold ?, # and, where no port could stand, /.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/]*|[^/@:]*:(?!\d+/)[^@]*)@")
_QUERY = re.compile(r"(://[^?#;]*)[?#;].*", re.DOTALL)

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_SHORTEST_SECRET = 8  # shorter ones, such as `none`, stand in honest text
_known_secrets: set[str] = set()

_TOKEN_SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|(?:gh[opsur]_|github_pat_|glpat-)[\w-]{20,}"
    r"|wandb_v\d_\w{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"  # AWS
    r"|sk-[\w-]{20,}"  # OpenAI and others
    r"|(?:AIza|ya29\.)[\w-]{30,}"  # Google
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?"  # JSON web tokens
)
# 40 hexadecimal digits are a commit as well; which of the two they are, the words before them say.
_NAMED_KEYS = re.compile(
    r"((?:wandb|api.?key|token|password|secret)[^\n]{0,40}?)(?<![A-Za-z0-9])[0-9a-f]{40}(?![A-Za-z0-9])", re.IGNORECASE
)
_AUTHORIZATION = re.compile(
    r"(authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?)[^\s'\"]+", re.IGNORECASE
)
# In a text an address ends at a blank, and a password that is not escaped with it.
_ADDRESS_IN_TEXT = re.compile(r"(?<=[A-Za-z0-9]{2}):/\S+")  # as a path it has but one slash
_LONGEST_ADDRESS = 4096  # characters; signed ones have some hundred
_CREDENTIALS_IN_TEXT = re.compile(r"(:/+)(?:[^/\s]*|[^/@:\s]*:(?!\d+/)[^@\s]*)@")
_QUERY_IN_TEXT = re.compile(r"(:/[^\s?]*\?)(\S+)")
_PARAMETERS_IN_TEXT = re.compile(r"(:/[^\s?#;]*[#;])([^\s=]*=\S*)")  # a fragment without = is a heading of a page
_AFTER_AN_ADDRESS = "'\")]}>.,:;…"

_LONGEST_QUOTED = 16  # a mistyped number, switch or choice; the shortest token in use has 20 characters
_TOKEN_BEGINNINGS = re.compile(r"hf_|gh[opsur]_|github_pat|glpat-|wandb_v|AKIA|ASIA|sk-|AIza|ya29\.|eyJ")


def redacted(location: str) -> str:
    """The location without credentials: URLs lose user, password, parameters, query and fragment, shell commands all
    but the program.

    A shell command keeps a digest, so that two commands can still be told apart. Anything else stays as it is.
    """
    if command := _COMMAND.search(location):
        program = _PROGRAM.match(location, command.end())
        digest = hashlib.sha256(location.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        return f"pipe:{program[1] if program else ''} … (sha256 {digest})"
    return _QUERY.sub(r"\1", _CREDENTIALS.sub("", location))


def is_shell_command(location: str) -> bool:
    """Whether webdataset, given this location, would run a command."""
    return _IS_COMMAND.match(location) is not None


def masked(text: str) -> str:
    """A text of any kind, such as a line of a log, without the tokens, passwords and queries of addresses in it.

    Known are what `keep_secret` was told, the tokens in the environment, and the shapes that tokens have.
    """
    # Addresses first, as long as they are whole; what was told to be a secret may hold one.
    text = _ADDRESS_IN_TEXT.sub(_masked_address, text)
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _NAMED_KEYS.sub(r"\1***", _AUTHORIZATION.sub(r"\1***", text))
    return _TOKEN_SHAPES.sub("***", text)


def keep_secret(secret: str) -> None:
    """What `masked` leaves out from now on, in this process."""
    _known_secrets.add(secret)


def described(text: str) -> str:
    """A wrong value for a message, where a number, a switch or a choice was expected: quoted if it is a mistyped one,
    else by its length alone, for it may be a token in the wrong place."""
    if len(text) <= _LONGEST_QUOTED and not looks_secret(text):
        return repr(text)
    return f"a text of {len(text)} characters"


def looks_secret(text: str) -> bool:
    """Whether a text begins as tokens do, holds an address with credentials, or is one of the known secrets."""
    return _TOKEN_BEGINNINGS.search(text) is not None or masked(text) != text


def _masked_address(found: re.Match[str]) -> str:
    if len(found[0]) > _LONGEST_ADDRESS:
        return "://***"
    address = _CREDENTIALS_IN_TEXT.sub(r"\1", found[0])
    return _PARAMETERS_IN_TEXT.sub(_without_end, _QUERY_IN_TEXT.sub(_without_end, address))


def _without_end(address: re.Match[str]) -> str:
    secret = address[2].rstrip(_AFTER_AN_ADDRESS)
    return address[1] + ("***" if secret else "") + address[2][len(secret) :]


def _secrets() -> Iterable[str]:
    known = _known_secrets | {os.environ.get(name, "") for name in _VARIABLES}
    candidates = known | {_ADDRESS_IN_TEXT.sub(_masked_address, secret) for secret in known}
    return {secret for secret in candidates if len(secret) >= _SHORTEST_SECRET}
