"""Numbers and sizes as people read them."""

import math


def format_number(x: float) -> str:
    """Thousands grouped; below 1000, four significant digits."""
    if isinstance(x, int) or (abs(x) >= 1000 and math.isfinite(x)):
        return f"{x:,.0f}"
    return f"{x:.4g}"


def format_bytes(size: float) -> str:
    """In decimal units, such as 13.5 GB."""
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("KB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"
