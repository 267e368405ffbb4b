"""TODO formatting"""

import math


def format_number(x: float) -> str:
    """A number for people: thousands grouped, small ones with four digits that mean something."""
    if isinstance(x, int) or (abs(x) >= 1000 and math.isfinite(x)):
        return f"{x:,.0f}"
    return f"{x:.4g}"


def format_bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError
