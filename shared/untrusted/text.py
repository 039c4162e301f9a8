"""Text of others on its way to a terminal, a log, an error or a page."""

_LONGEST_SHOWN = 300  # characters: enough for any honest name or path, too few to fill a screen


def shown(value: object, limit: int = _LONGEST_SHOWN) -> str:
    """A value as a part of one line: line breaks, ESC and whatever else does not print are escaped, long text is cut.

    Half a surrogate pair and bytes that were no UTF-8 are escaped too, so that the result can be written anywhere.
    """
    text = str(value)
    cut = text if len(text) <= limit else f"{text[: limit * 2 // 3]}…{text[-limit // 3 :]}"
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in cut)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
