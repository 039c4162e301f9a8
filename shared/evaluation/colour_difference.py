"""How different two colours look to people.

Axes: `...` any leading axes, C = 3 channels.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Colours = npt.NDArray[np.float64]

_LINEAR_RGB_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_D65_WHITE = _LINEAR_RGB_TO_XYZ.sum(axis=1)


def srgb_to_lab(rgb_C: npt.ArrayLike) -> Colours:
    """sRGB [..., 3], 0 to 255, → CIE L*a*b* [..., 3] under D65. Reference: IEC 61966-2-1, CIE 15:2004."""
    encoded_C = np.asarray(rgb_C, np.float64) / 255
    linear_C = np.where(encoded_C <= 0.04045, encoded_C / 12.92, ((encoded_C + 0.055) / 1.055) ** 2.4)
    xyz_C = linear_C @ _LINEAR_RGB_TO_XYZ.T / _D65_WHITE
    f_C = np.where(xyz_C > (6 / 29) ** 3, np.cbrt(xyz_C), xyz_C / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f_C, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def ciede2000(lab1_C: npt.ArrayLike, lab2_C: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The CIEDE2000 difference of L*a*b* colours [..., 3] that broadcast; 0 for equal ones, 100 from black to white.

    Reference: Sharma, Wu & Dalal 2005, "The CIEDE2000 color-difference formula: implementation notes, supplementary
    test data, and mathematical observations", equations 2 to 22 with kL = kC = kH = 1.
    """
    lightness1, chroma1, hue1, lightness2, chroma2, hue2 = _adjusted(lab1_C, lab2_C)
    chromatic = chroma1 * chroma2 != 0
    hue_step = np.where(chromatic, (hue2 - hue1 + 180) % 360 - 180, 0.0)
    hue_difference = 2 * np.sqrt(chroma1 * chroma2) * np.sin(np.radians(hue_step) / 2)
    mean_hue = np.where(chromatic, _mean_hue(hue1, hue2), hue1 + hue2)

    mean_lightness, mean_chroma = (lightness1 + lightness2) / 2, (chroma1 + chroma2) / 2
    lightness_term = (lightness2 - lightness1) / (
        1 + 0.015 * (mean_lightness - 50) ** 2 / np.sqrt(20 + (mean_lightness - 50) ** 2)
    )
    chroma_term = (chroma2 - chroma1) / (1 + 0.045 * mean_chroma)
    hue_term = hue_difference / (1 + 0.015 * mean_chroma * _hue_weight(mean_hue))
    rotation = -np.sin(np.radians(60 * np.exp(-(((mean_hue - 275) / 25) ** 2)))) * 2 * _chroma_saturation(mean_chroma)
    squared = lightness_term**2 + chroma_term**2 + hue_term**2 + rotation * chroma_term * hue_term
    return np.sqrt(np.maximum(squared, 0.0))


def _adjusted(lab1_C: npt.ArrayLike, lab2_C: npt.ArrayLike) -> tuple[Any, ...]:
    """Lightness, chroma and hue (degrees) of both colours, with the a* axis stretched for near-greys (eq. 2 to 7)."""
    (l1, a1, b1), (l2, a2, b2) = (np.moveaxis(np.asarray(lab, np.float64), -1, 0) for lab in (lab1_C, lab2_C))
    stretch = 1.5 - _chroma_saturation((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) / 2
    a1, a2 = a1 * stretch, a2 * stretch
    hue1, hue2 = (np.degrees(np.arctan2(b, a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    return l1, np.hypot(a1, b1), hue1, l2, np.hypot(a2, b2), hue2


def _chroma_saturation(chroma: Any) -> Any:
    return np.sqrt(chroma**7 / (chroma**7 + 25.0**7))


def _mean_hue(hue1: Any, hue2: Any) -> Any:
    """The middle of the shorter arc (eq. 14)."""
    middle = (hue1 + hue2) / 2
    return np.where(np.abs(hue1 - hue2) <= 180, middle, np.where(hue1 + hue2 < 360, middle + 180, middle - 180))


def _hue_weight(hue: Any) -> Any:
    return (
        1
        - 0.17 * np.cos(np.radians(hue - 30))
        + 0.24 * np.cos(np.radians(2 * hue))
        + 0.32 * np.cos(np.radians(3 * hue + 6))
        - 0.20 * np.cos(np.radians(4 * hue - 63))
    )
