"""Matplotlib figures drawn without a display and saved as PNG, on disk or in a bucket."""

import io
import os
from typing import TYPE_CHECKING, Any

from lowrank.files import paths
from lowrank.files.bucket import BucketPath
from lowrank.files.lines import writing

if TYPE_CHECKING:  # Matplotlib takes a second to import: only what draws imports it.
    from matplotlib.figure import Figure

DPI = 120


def figure(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float] | None = None, **options
) -> "tuple[Figure, Any]":
    """A figure in constrained layout (`figsize` in inches) and its axes, as `pyplot.subplots` returns them.

    `options` go to `Figure.subplots` (sharex, squeeze, height_ratios, …). The figure belongs to no pyplot state: it needs
    no backend and no closing.
    """
    from matplotlib.figure import Figure

    made = Figure(figsize=figsize, layout="constrained")
    return made, made.subplots(rows, columns, **options)


def save(figure: "Figure", path: str | os.PathLike | paths.Path) -> None:
    """Write the figure as PNG; the file appears, or is replaced, whole. UserError if it cannot be written."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    target = paths.path(path)
    if isinstance(target, BucketPath):
        target.write_bytes(content.getvalue())
        return
    fresh = target.with_name(f"{target.name}.tmp")
    with writing(target):
        fresh.write_bytes(content.getvalue())
        fresh.replace(target)
