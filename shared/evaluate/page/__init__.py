"""The page that shows an evaluation: one HTML file with everything in it but the pictures at their full size."""

from shared.evaluate.page.html import render

__all__ = ["render"]
