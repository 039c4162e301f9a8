"""How pages are made: jinja2 with everything escaped, and one stylesheet."""

from pathlib import Path

import jinja2
from markupsafe import Markup

from shared.untrusted.text import harmless

_HERE = Path(__file__).parent
_LONGEST_TEXT = 20_000  # characters; the longest is a command with many prompts


def page_environment(templates: Path) -> jinja2.Environment:
    """For the templates of a folder: what is text of others acts in no way on a page."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        autoescape=True,
        finalize=_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def style() -> Markup:
    """The stylesheet, to stand inside a page."""
    return Markup((_HERE / "page.css").read_text(encoding="utf-8"))


def _text(value: object) -> object:
    """What a template shows: text of others without control characters and of a length that fits on a page.

    Escaping what has a meaning in HTML is left to jinja, which passes over what was made here (`Markup`).
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    cut = value if len(value) <= _LONGEST_TEXT else f"{value[:_LONGEST_TEXT]}…"
    return harmless(cut)
