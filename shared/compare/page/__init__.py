"""The page that shows a comparison: one HTML file with everything in it."""

from shared.compare.page.html import render

__all__ = ["render"]
