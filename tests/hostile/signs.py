"""What an input left behind in what people read: secrets, files of the user's own, forged lines, live markup."""

import base64
import io
import re
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image

from tests.hostile.case import FORGED, PRIVATE_COLOUR, Case
from tests.hostile.outcome import Outcome, Sign

_NEAR = 3.0  # of a channel, after a lossy copy
_FORGED_LINE = re.compile(rf"(?:\A|[\n\r]){FORGED}")
_ON_A_LINE = frozenset("\n\t\r")  # progress bars return to the beginning of their line
_UNSHOWN = {"Cc", "Cs", "Zl", "Zp"}
_TURNS_ROUND = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_ADDRESSES = {"href", "src", "srcset", "action", "formaction", "xlink:href", "data", "poster", "background"}
_DEAD = ("#", "data:image/")  # what an address of a page that holds everything itself may begin with
_DANGEROUS = {"script", "iframe", "object", "embed", "base", "form", "link", "applet", "foreignobject", "portal"}
_LARGEST_LOOKED_AT = 64 * 2**20


def signs_in_text(case: Case, text: str, where: str) -> Iterator[Sign]:
    """Of text for a terminal, a log or a file that people read."""
    yield from _secrets_in(case, text, where)
    raw = next((index for index, letter in enumerate(text) if _cannot_be_shown(letter)), None)
    if raw is not None:
        yield Sign(Outcome.FORGED, f"{where} holds U+{ord(text[raw]):04X}: {_around(text, raw)}")
    line = _FORGED_LINE.search(text)
    if line is not None:
        yield Sign(Outcome.FORGED, f"{where} has a line of the input's own: {_around(text, line.start())}")


def signs_in_files(case: Case, folder: Path) -> Iterator[Sign]:
    """Of everything that a command wrote."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST_LOOKED_AT:
            continue
        content = path.read_bytes()
        if case.secret.encode() in content:
            yield Sign(Outcome.LEAKED, f"{path.name} holds a secret")
        if is_private_picture(content):
            yield Sign(Outcome.LEAKED, f"{path.name} is a picture from outside of the data's folder")


def is_private_picture(content: bytes) -> bool:
    """Whether this is the canary picture, or a copy of it."""
    if not content.startswith((b"\x89PNG", b"RIFF", b"\xff\xd8")):
        return False
    try:
        with PIL.Image.open(io.BytesIO(content), formats=("PNG", "WEBP", "JPEG")) as picture:
            if picture.width * picture.height > 10**6:
                return False
            return are_private_pixels(np.asarray(picture.convert("RGB")))
    except (OSError, ValueError, SyntaxError):
        return False


def are_private_pixels(pixels_HWC: np.ndarray) -> bool:
    """uint8 [H, W, 3]: whether most of them have the colour of the canary."""
    near_HW = (np.abs(pixels_HWC.astype(np.float32) - PRIVATE_COLOUR) <= _NEAR).all(-1)
    return bool(near_HW.mean() > 0.5)


def signs_in_page(case: Case, page: str, *, policy: bool = True, where: str = "the page") -> Iterator[Sign]:
    """Of HTML: text of the input that came alive, addresses that lead elsewhere, private pictures.

    `policy`: whether the page is to forbid scripts itself.
    """
    yield from _secrets_in(case, page, where)
    reader = _Markup()
    reader.feed(page)
    reader.close()
    for reason in reader.alive:
        yield Sign(Outcome.FORGED, f"{where}: {reason}")
    if policy and not reader.has_policy:
        yield Sign(Outcome.FORGED, f"{where} has no Content-Security-Policy")
    for encoded in reader.pictures:
        if is_private_picture(base64.b64decode(encoded)):
            yield Sign(Outcome.LEAKED, f"{where} shows a picture from outside of the run's folder")


class _Markup(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.alive: list[str] = []
        self.pictures: list[str] = []
        self.has_policy = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in _DANGEROUS:
            self.alive.append(f"<{tag}> is alive")
        if tag == "meta" and values.get("http-equiv", "").lower() == "content-security-policy":
            self.has_policy = True
        elif tag == "meta" and "http-equiv" in values:
            self.alive.append("<meta http-equiv> is alive")
        for name, value in values.items():
            if name.startswith("on"):
                self.alive.append(f"{name}= on <{tag}>")
            if name == "style" and "url(" in value.lower().replace("\\", ""):
                self.alive.append(f"url() in the style of <{tag}>")
            if name in _ADDRESSES and not value.startswith(_DEAD):
                self.alive.append(f"{name}={value[:60]!r} on <{tag}>")
            if value.startswith("data:image/") and ";base64," in value:
                self.pictures.append(value.partition(";base64,")[2])


def _secrets_in(case: Case, text: str, where: str) -> Iterator[Sign]:
    if case.secret in text:
        yield Sign(Outcome.LEAKED, f"{where} shows a secret: {_around(text, text.index(case.secret))}")


def _cannot_be_shown(letter: str) -> bool:
    """Whether it moves a terminal's cursor, ends a line, turns its direction round, or is half a letter."""
    return letter not in _ON_A_LINE and (unicodedata.category(letter) in _UNSHOWN or letter in _TURNS_ROUND)


def _around(text: str, index: int) -> str:
    return ascii(text[max(0, index - 60) : index + 60])
