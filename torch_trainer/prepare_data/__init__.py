"""Conditions and captions that models make of images, for `python3 -m shared.prepare_data annotate` and `caption`."""
