"""The parts of a step that profiles tell apart, and what they are called there."""

PARTS = ("vae", "text_encoder", "controlnet", "unet", "optimizer")
PLANE = "/device:CUSTOM:parts of the model"
"""Of a trace, the device whose rows are the parts. xprof shows planes of this prefix as they are."""


_BACKWARD = " backward"


def backward(part: str) -> str:
    """What the backward pass of a part is called, and what is computed again in it."""
    return part if part.endswith(_BACKWARD) else part + _BACKWARD
