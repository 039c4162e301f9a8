"""Attention and convolutions as the devices want them."""
