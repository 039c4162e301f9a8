"""Decoded pictures → the pixels of a batch, without Python's lock, so that threads share the work."""

from shared.data.pixels.decoding import Picture, plain_pixels
from shared.data.pixels.rendering import render

__all__ = ["Picture", "plain_pixels", "render"]
