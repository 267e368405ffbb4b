"""The pictures of an analysis."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lowrank.analysis.measure import Module, Modules
from lowrank.files import figure as figures
from lowrank.files import paths

QUANTITIES: dict[str, Callable[[Module], float]] = {
    "‖ΔW‖ / ‖W‖": lambda module: module.relative_norm,
    "effective rank of ΔW": lambda module: module.effective_rank,
    "amplification": lambda module: module.norms.factor,
}
INTEGERS: dict[str, Any] = {"integer": True, "min_n_ticks": 1}  # of a matplotlib locator


def draw_values(file: paths.Path, modules: Modules) -> None:
    """The singular values of ΔW: a panel for each projection, a line for each layer."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    figure, axes = _panels(len(modules), most=4, width=3.2, height=2.8, sharey=True)
    last = max(module.layer for of in modules.values() for module in of)
    shades = ScalarMappable(Normalize(0, last / 0.9 or 1), "viridis")  # the last tenth is too pale for a line
    for axis, (target, of) in zip(axes.flat, modules.items(), strict=False):
        for module in of:
            values = module.update.values
            axis.plot(range(1, len(values) + 1), values, color=shades.to_rgba(module.layer), marker=".", linewidth=1)
        axis.set(title=target, yscale="log", xlabel="i")
        axis.grid(alpha=0.3)
        axis.locator_params("x", **INTEGERS)
    figure.supylabel("singular value of ΔW")
    ticks = MaxNLocator("auto", **INTEGERS)
    figure.colorbar(shades, ax=axes, label="layer", boundaries=np.arange(last + 2) - 0.5, ticks=ticks)
    figures.save(figure, file)


def draw_modules(file: paths.Path, modules: Modules) -> None:
    """Three heat maps, layers down and projections across."""
    depth = 1 + max(module.layer for of in modules.values() for module in of)
    figure, axes = figures.figure(1, len(QUANTITIES), figsize=(13, 1.8 + 0.3 * depth), sharey=True)
    for axis, (title, quantity) in zip(axes, QUANTITIES.items(), strict=True):
        table = np.full((depth, len(modules)), np.nan)  # a layer without the projection stays white
        for column, of in enumerate(modules.values()):
            for module in of:
                table[module.layer, column] = quantity(module)
        figure.colorbar(axis.imshow(table, aspect="auto", vmin=0), ax=axis)
        axis.set_title(title)
        axis.set_xticks(range(len(modules)), list(modules), rotation=45, ha="right")
        axis.locator_params("y", **INTEGERS)
    axes[0].set_ylabel("layer")
    figures.save(figure, file)


def draw_similarity(file: paths.Path, title: str, names: tuple[str, str], maps: dict[int, np.ndarray]) -> None:
    """A heat map of φ(i, j) for each layer; `names`: of the two adapters."""
    figure, axes = _panels(len(maps), most=6, width=2.2, height=2.4)
    for axis, (layer, phi) in zip(axes.flat, maps.items(), strict=False):
        extent = (0.5, phi.shape[1] + 0.5, phi.shape[0] + 0.5, 0.5)
        image = axis.imshow(phi, vmin=0, vmax=1, aspect="auto", extent=extent)
        axis.set_title(f"layer {layer}", fontsize=9)
        axis.locator_params(**INTEGERS)
    figure.colorbar(image, ax=axes, label="φ(i, j)")
    figure.suptitle(title)
    figure.supxlabel(f"j, of {names[1]}")
    figure.supylabel(f"i, of {names[0]}")
    figures.save(figure, file)


def _panels(count: int, most: int, width: float, height: float, **options):
    """A figure with `count` panels, at most `most` side by side, each of `width` x `height` inches."""
    columns = min(most, count)
    rows = -(-count // columns)
    size = (width * columns + 1, height * rows + 0.4)
    figure, axes = figures.figure(rows, columns, figsize=size, squeeze=False, **options)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes
