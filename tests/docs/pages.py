"""README.md and docs/*.md, taken apart: blocks of code, links, headings, and what stands `in backticks`."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """A page of Markdown. `path` is relative to the repository."""

    path: Path
    text: str

    @property
    def prose(self) -> str:
        """The page without its blocks of code."""
        return _FENCE.sub("", self.text)

    def blocks(self, language: str) -> list[str]:
        return [body for named, body in _FENCE.findall(self.text) if named == language]

    def languages(self) -> set[str]:
        return {named for named, _ in _FENCE.findall(self.text)}

    def inline(self) -> list[str]:
        """What stands in backticks, outside of blocks."""
        return _INLINE.findall(self.prose)

    def links(self) -> list[str]:
        """Targets of links and pictures that are no addresses."""
        targets = [link or picture for link, picture in _LINK.findall(self.prose)]
        return [target for target in targets if "://" not in target]

    def anchors(self) -> set[str]:
        """What GitHub calls the page's headings."""
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(self.prose)}


def page(path: Path) -> Page:
    return Page(path.relative_to(ROOT), path.read_text(encoding="utf-8"))


def pages() -> list[Page]:
    return [page(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
