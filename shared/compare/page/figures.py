"""Numbers as people read them: sensible digits, with units. What is missing is a dash."""

import math

MISSING = "–"

_LARGEST_WITH_ALL_DIGITS = 1e15

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def plain(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, large ones with all digits before the point: 0.0184, 105, 16,217."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= _LARGEST_WITH_ALL_DIGITS:
        return scientific(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def scientific(value: float | None) -> str:
    """A small number of 0 or more: `3.1 × 10⁻⁶`, `0.12`, `infinite`."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "infinite"
    if value == 0:
        return "0"
    if 0.01 <= value < 1000:
        return plain(value, 2)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × {_power(int(exponent))}"


def power_of_ten(value: float) -> str:
    """`10⁻³`, for a value that is one."""
    return _power(round(math.log10(value)))


def seconds(value: float | None) -> str:
    """A short time: `21.3 ms`, `1.84 s`."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{plain(value * 1e3)} ms" if value < 1 else f"{plain(value)} s"


def duration(value: float | None) -> str:
    """A long time: `12 s`, `3 min 12 s`, `5 h 07 min`."""
    if value is None or not math.isfinite(value):
        return MISSING
    total = round(value)
    if total < 60 or total >= _LARGEST_WITH_ALL_DIGITS:
        return f"{plain(value)} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02} s"
    return f"{total // 3600:,} h {total % 3600 // 60:02} min"


def gibibytes(value: float | None) -> str:
    """`1.21 GiB`."""
    return MISSING if value is None or not math.isfinite(value) else f"{plain(value)} GiB"


def percent(value: float | None) -> str:
    """A share of 1 in percent: `3.2%`."""
    return MISSING if value is None or not math.isfinite(value * 100) else f"{plain(value * 100, 2)}%"


def change(a: float | None, b: float | None) -> str:
    """What b is compared with a: `−12%`, `+0.4%`, `the same`; from twice as much on `2.3 ×`."""
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)) or a <= 0 or b <= 0:
        return MISSING
    ratio = b / a
    if ratio >= 2 or ratio <= 0.5:
        return f"{plain(ratio, 2)} ×"
    share = abs(ratio - 1)
    if share < 5e-4:
        return "the same"
    return f"{'+' if ratio > 1 else '−'}{percent(share)}"


def difference(a: float | None, b: float | None) -> str:
    """b - a with its sign: `+0.012`."""
    if a is None or b is None or not math.isfinite(b - a):
        return MISSING
    if a == b:
        return "0"
    return f"{'+' if b > a else '−'}{plain(abs(b - a), 2)}"


def whole(value: int | None) -> str:
    """A count: `16,000`."""
    return MISSING if value is None else f"{value:,}"


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(_SUPERSCRIPTS)
