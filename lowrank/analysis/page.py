"""An analysis as files: a page to read first, tables as CSV, and pictures."""

import csv
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from lowrank.analysis import pictures
from lowrank.analysis.measure import Analysis, Module
from lowrank.files.new_folder import new_folder

COLUMNS = (  # of analysis.csv
    *("layer", "projection", "rank", "update_norm", "largest_value", "effective_rank", "base_norm"),
    *("base_through_update", "base_through_base", "base_through_random", "amplification"),
)
SHOWN = {"lora_a": "lora_a", "update": "ΔW"}


def write_analysis(analysis: Analysis, to: str | os.PathLike) -> None:
    """Make the folder `to`: analysis.md, tables as CSV and pictures. UserError if it exists or cannot be written."""
    modules = [module for of in analysis.modules.values() for module in of]
    with new_folder(to) as folder:
        _write_csv(folder / "analysis.csv", COLUMNS, map(_row, modules))
        values = ((m.layer, m.projection, i, value) for m in modules for i, value in enumerate(m.update.values, 1))
        _write_csv(folder / "singular_values.csv", ("layer", "projection", "i", "value"), values)
        pictures.draw_values(folder / "singular_values.png", analysis.modules)
        pictures.draw_modules(folder / "modules.png", analysis.modules)
        if analysis.other:
            rows = (
                (layer, target, of, i + 1, j + 1, value)
                for (target, of), maps in analysis.similarities.items()
                for layer, phi in maps.items()
                for (i, j), value in np.ndenumerate(phi)
            )
            _write_csv(folder / "similarity.csv", ("layer", "projection", "of", "i", "j", "phi"), rows)
            for (target, of), maps in analysis.similarities.items():
                title = f"{target}: directions of {SHOWN[of]} that both adapters share"
                names = (analysis.adapter.name, analysis.other.name)
                pictures.draw_similarity(folder / f"similarity_{target}_{of}.png", title, names, maps)
        (folder / "analysis.md").write_text(describe(analysis), encoding="utf-8")


def _row(module: Module) -> tuple:
    """The values of COLUMNS."""
    norms = module.norms
    return (
        *(module.layer, module.projection, module.rank, norms.update, module.update.values[0], module.effective_rank),
        *(norms.base, norms.through_update, norms.through_base, norms.through_random, norms.factor),
    )


def _write_csv(file: pathlib.Path, columns: Iterable[str], rows: Iterable[tuple]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)


def describe(analysis: Analysis) -> str:
    """The page: a row for each projection, and what the numbers say."""
    lines = [
        f"# What `{analysis.adapter}` does to its base",
        "",
        "Geometric means over layers; `analysis.csv` has every layer. ‖·‖ is the Frobenius norm; `rank` directions are used.",
        "",
        "| projection | rank | ‖ΔW‖ / ‖W‖ | effective rank | share of the first direction | amplification "
        "| ‖ΔW‖ / W in its own strongest directions |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for target, of in analysis.modules.items():
        norms = [(m.relative_norm, m.norms.factor, m.norms.update / m.norms.through_base) for m in of]
        shares = [(m.effective_rank, (m.update.values[0] / m.norms.update) ** 2) for m in of]
        norm, factor, own, effective, first = np.exp(np.mean(np.log(np.hstack([norms, shares])), axis=0))
        ranks = sorted({module.rank for module in of})
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines.append(f"| {target} | {shown} | {norm:.4f} | {effective:.1f} | {first:.0%} | {factor:.1f} | {own:.2f} |")
    modules = [module for of in analysis.modules.values() for module in of]
    strongest = max(modules, key=lambda module: module.relative_norm)
    used = np.mean([m.effective_rank / len(m.update.values) for m in modules])
    through = np.array([(m.norms.through_update, m.norms.through_random, m.norms.through_base) for m in modules])
    update, random, own = np.linalg.norm(through, axis=0)
    lines += [
        "",
        f"- **Where**: the update that is strongest relative to its kernel is that of `{strongest.projection}` in layer "
        f"{strongest.layer} ({strongest.relative_norm:.4f} of ‖W‖).",
        f"- **How many directions**: the effective rank is on average {used:.0%} of the directions there are. Singular "
        "values: `singular_values.png`.",
        "- **What is amplified** (paper, section 7.3): amplification is ‖ΔW‖ over the norm of W seen through ΔW's own "
        f"directions. Over all layers, W is {update / random:.1f} times as strong there as through random directions, and "
        f"{update / own:.2f} times as strong as through its own strongest directions.",
    ]
    if analysis.other:
        lines += [
            "",
            f"## Directions shared with `{analysis.other}`",
            "",
            "φ(i, j) is 1 where the first i directions of one adapter and the first j of the other span the same space "
            "(section 7.2); two random spaces would have max(i, j) / in. Means over layers.",
            "",
        ]
    if analysis.common_seed is not None:
        lines += [
            f"Both runs have seed {analysis.common_seed}: where their ranks are equal they began with the same lora_a, so "
            "what they share there says little. Compare runs with different seeds.",
            "",
        ]
    if analysis.other:
        lines += ["| projection | of | φ(1, 1) | φ of all | random, of all |", "| --- | --- | --- | --- | --- |"]
    for (target, kind), maps in analysis.similarities.items():
        inputs = len(analysis.modules[target][0].lora_a)
        table = [(phi[0, 0], phi[-1, -1], max(phi.shape) / inputs) for phi in maps.values()]
        first, whole, random = np.mean(table, axis=0)
        lines.append(f"| {target} | {SHOWN[kind]} | {first:.3f} | {whole:.3f} | {random:.3f} |")
    return "\n".join(lines) + "\n"
