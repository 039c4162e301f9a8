"""Text of others on its way to a terminal, a log, an error or a page."""

import codecs
import re

_LONGEST_SHOWN = 300  # characters: enough for any honest name or path, too few to fill a screen

_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def shown(value: object, limit: int = _LONGEST_SHOWN) -> str:
    """A value as a part of one line: line breaks, ESC and whatever else does not print are escaped, long text is cut.

    Half a surrogate pair and bytes that were no UTF-8 are escaped too, so that the result can be written anywhere.
    """
    text = str(value)
    cut = text if len(text) <= limit else f"{text[: limit * 2 // 3]}…{text[-limit // 3 :]}"
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in cut)


def decoded(content: bytes) -> str:
    """A text file's content: UTF-8, or UTF-16 where its byte order mark says so, as Windows PowerShell writes it.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig")


def harmless(text: str) -> str:
    """A whole text with its line breaks, tabs and every letter as they are: only what acts on a terminal is escaped.

    Those are control characters, what reverses the reading direction or separates lines unseen, and what is no text.
    """
    return text if text.isprintable() else _ACTING.sub(lambda found: _escaped(found[0]), text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
