"""What an adapter does to its base: how strong each update is, how many directions it uses, and what it amplifies.

    python -m lowrank.analyze --adapter=runs/r16 --to=analysis/r16
    python -m lowrank.analyze --adapter=runs/r64 --other=runs/r8 --to=analysis/r64-and-r8

The questions of section 7 of the LoRA paper. With --other, a second adapter over the same base (another rank, another
seed), also: which directions do the two share? Writes analysis.md, tables as CSV and pictures into a new folder.
"""

import csv
import functools
import operator
import pathlib

import jax
import numpy as np
from absl import flags

from lowrank.adapters.lora import TARGETS
from lowrank.analysis import subspaces
from lowrank.cli import run as cli
from lowrank.errors import UserError
from lowrank.files import paths
from lowrank.files.new_folder import new_folder
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.runs import workdir
from lowrank.runs.adapter import Adapter, read_adapter
from lowrank.weights.base import Base, read_base

flags.DEFINE_string("adapter", None, "An adapter: the workdir of a run (its latest step), or a PEFT folder.")
flags.DEFINE_string("other", None, "A second adapter over the same base, to compare directions with.")
flags.DEFINE_string("base", None, "The base; default: the one that the adapter's run names.")
flags.DEFINE_string("to", None, "The folder to make.")
FLAGS = flags.FLAGS

Modules = dict[str, list[dict]]  # of each target, in each layer: the factors and what was computed from them
COLUMNS = (  # of analysis.csv
    *("layer", "projection", "rank", "update_norm", "largest_value", "effective_rank", "base_norm"),
    *("base_through_update", "base_through_base", "base_through_random", "amplification"),
)


def main(arguments: list[str]):
    cli.refuse_unknown(arguments)
    missing = [f"--{name}" for name in ("adapter", "to") if not getattr(FLAGS, name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing; see --help")
    base = find_base(read_adapter(FLAGS.adapter))
    modules = measure(FLAGS.adapter, base)
    others = measure(FLAGS.other, base) if FLAGS.other else {}
    shared = similarities(modules, others)
    if others and not shared:
        raise UserError(
            f"{FLAGS.adapter} and {FLAGS.other} have no projection of any layer in common: nothing to compare"
        )
    with new_folder(FLAGS.to) as folder:
        rows = [[layer[name] for name in COLUMNS] for layers in modules.values() for layer in layers]
        write_csv(folder / "analysis.csv", COLUMNS, rows)
        values = [
            (layer["layer"], target, i, value)
            for target, layers in modules.items()
            for layer in layers
            for i, value in enumerate(layer["update"].values, start=1)
        ]
        write_csv(folder / "singular_values.csv", ("layer", "projection", "i", "value"), values)
        draw_values(folder / "singular_values.png", modules)
        draw_modules(folder / "modules.png", modules)
        if shared:
            write_csv(
                folder / "similarity.csv", ("layer", "projection", "of", "i", "j", "phi"), similarity_rows(shared)
            )
            for (target, of), maps in shared.items():
                draw_similarity(folder / f"similarity_{target}_{of}.png", target, of, maps)
        (folder / "analysis.md").write_text(describe(modules, shared, base), encoding="utf-8")
    print(f"analysis of {sum(map(len, modules.values()))} updates in {FLAGS.to}; read {FLAGS.to}/analysis.md first")


def find_base(adapter: Adapter) -> Base:
    named = FLAGS.base or (workdir.read_config(adapter.folder).base if adapter.step is not None else None)
    if not named:
        raise UserError(f"--base is missing: {adapter.folder} is not the workdir of a run, which would name its base")
    return read_base(named)


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def measure(folder: str, base: Base) -> Modules:
    """Everything that concerns one adapter, of every projection that carries it."""
    adapter = read_adapter(folder, layers=base.config.layers)
    if adapter.lora is None:
        raise UserError(f"{adapter.folder} is a full fine-tuning: there are no factors to analyse; give an adapter")
    if adapter.base not in (None, base.fingerprint):
        raise UserError(
            f"{adapter.folder} was trained over other weights than those in {base.folder}; give its own base, and to compare "
            "two adapters both of the same one"
        )
    shapes, _ = decoder.abstract(Decoder(base.config, adapter.lora))
    lora = jax.device_get(adapter.restore({"lora": shapes["lora"]})["lora"])["layers"]
    modules: Modules = {}
    for target in (target for target in TARGETS if target in adapter.lora.targets):
        block = next(block for block in lora if target in lora[block])
        kernels = functools.reduce(operator.getitem, ("layers", block, target, "kernel"), base.params)
        ranks, scales = (of(target, base.config.layers) for of in (adapter.lora.layer_ranks, adapter.lora.layer_scales))
        for layer, (rank, scale) in enumerate(zip(ranks, scales, strict=True)):
            if not rank:
                continue
            lora_a, lora_b = (lora[block][target][name][layer] for name in ("lora_a", "lora_b"))
            lora_a, lora_b = lora_a[:, :rank], lora_b[:rank]  # the rest is padding
            update = subspaces.decompose(lora_a, lora_b, scale)
            seen = subspaces.amplification(np.asarray(kernels[layer], np.float32), update, rank)
            numbers = (
                *(layer, target, rank, seen.update, float(update.values[0]), subspaces.effective_rank(update.values)),
                *(seen.base, seen.through_update, seen.through_base, seen.through_random, seen.factor),
            )
            module = dict(zip(COLUMNS, numbers, strict=True)) | {"update": update, "lora_a": lora_a}
            modules.setdefault(target, []).append(module)
    zero = [f"{m['projection']} in layer {m['layer']}" for ms in modules.values() for m in ms if not m["update_norm"]]
    if zero:
        raise UserError(
            f"{adapter.folder}: the update of {', '.join(zero)} is zero: it was not trained yet; train it first"
        )
    return modules


def similarities(modules: Modules, others: Modules) -> dict[tuple[str, str], dict[int, np.ndarray]]:
    """(target, what) -> layer -> φ(i, j), of the input directions of lora_a and of the whole update."""
    directions = {
        "lora_a": lambda module: subspaces.input_directions(module["lora_a"]),
        "update": lambda module: module["update"].left,
    }
    shared = {}
    for target in (target for target in modules if target in others):
        by_layer = {module["layer"]: module for module in others[target]}
        pairs = [(module, by_layer[module["layer"]]) for module in modules[target] if module["layer"] in by_layer]
        for of, directions_of in directions.items() if pairs else ():
            shared[target, of] = {
                one["layer"]: subspaces.similarity(directions_of(one), directions_of(other)) for one, other in pairs
            }
    return shared


# ---- Files -----------------------------------------------------------------------------------------------------------


def write_csv(file: pathlib.Path, columns, rows):
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)


def similarity_rows(shared):
    for (target, of), maps in shared.items():
        for layer, phi in maps.items():
            for (i, j), value in np.ndenumerate(phi):
                yield layer, target, of, i + 1, j + 1, float(value)


def _pyplot():
    import matplotlib

    matplotlib.use("agg")  # no display is needed, nor looked for
    from matplotlib import pyplot

    return pyplot


def whole_numbers(axis, most: int = 10):
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def draw_values(file: pathlib.Path, modules: Modules):
    """A panel for each projection, a line for each layer."""
    plt = _pyplot()
    columns = min(4, len(modules))
    rows = -(-len(modules) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.2 * columns + 1, 2.8 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    last = max(layer["layer"] for layers in modules.values() for layer in layers)
    dark = plt.matplotlib.colors.ListedColormap(plt.get_cmap("viridis")(np.linspace(0, 0.9, max(2, last + 1))))
    shades = plt.cm.ScalarMappable(
        plt.Normalize(-0.5, last + 0.5), dark
    )  # a shade for each layer, none of them too pale
    for axis, (target, layers) in zip(axes.flat, modules.items(), strict=False):
        for layer in layers:
            values = layer["update"].values
            axis.plot(range(1, len(values) + 1), values, color=shades.to_rgba(layer["layer"]), marker=".", linewidth=1)
        axis.set(title=target, yscale="log", xlabel="i")
        whole_numbers(axis.xaxis)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(modules) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("singular value of ΔW")
    whole_numbers(figure.colorbar(shades, ax=axes, label="layer").ax.yaxis)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_modules(file: pathlib.Path, modules: Modules):
    """Layers down, projections across: three heat maps."""
    plt = _pyplot()
    depth = 1 + max(layer["layer"] for layers in modules.values() for layer in layers)
    shown = {
        "‖ΔW‖ / ‖W‖": lambda layer: layer["update_norm"] / layer["base_norm"],
        "effective rank of ΔW": lambda layer: layer["effective_rank"],
        "amplification": lambda layer: layer["amplification"],
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 1.8 + 0.3 * depth), layout="constrained", sharey=True)
    for axis, (title, number) in zip(axes, shown.items(), strict=True):
        table = np.full((depth, len(modules)), np.nan)  # a layer without the projection stays white
        for column, layers in enumerate(modules.values()):
            for layer in layers:
                table[layer["layer"], column] = number(layer)
        image = axis.imshow(table, aspect="auto", cmap="viridis", vmin=0)
        axis.set(title=title, xticks=range(len(modules)))
        axis.set_xticklabels(list(modules), rotation=45, ha="right")
        whole_numbers(axis.yaxis)
        figure.colorbar(image, ax=axis)
    axes[0].set_ylabel("layer")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_similarity(file: pathlib.Path, target: str, of: str, maps: dict[int, np.ndarray]):
    """A heat map of φ(i, j) for each layer."""
    plt = _pyplot()
    columns = min(6, len(maps))
    rows = -(-len(maps) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.2 * columns + 1, 2.3 * rows + 0.4), squeeze=False, layout="constrained"
    )
    for axis, (layer, phi) in zip(axes.flat, maps.items(), strict=False):
        extent = (0.5, phi.shape[1] + 0.5, phi.shape[0] + 0.5, 0.5)
        image = axis.imshow(phi, cmap="viridis", vmin=0, vmax=1, aspect="auto", extent=extent)
        axis.set_title(f"layer {layer}", fontsize=9)
        for side in (axis.xaxis, axis.yaxis):
            whole_numbers(side, most=4)
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes, label="φ(i, j)")
    figure.suptitle(f"{target}: directions of {'ΔW' if of == 'update' else 'lora_a'} that both adapters share")
    figure.supxlabel(f"j, of {pathlib.Path(FLAGS.other).name}")
    figure.supylabel(f"i, of {pathlib.Path(FLAGS.adapter).name}")
    figure.savefig(file, dpi=120)
    plt.close(figure)


# ---- Words -----------------------------------------------------------------------------------------------------------


def describe(modules: Modules, shared, base: Base) -> str:
    """One page: a row for each projection, and what it says."""
    lines = [
        f"# What `{FLAGS.adapter}` does to its base",
        "",
        "Geometric means over layers; `analysis.csv` has every layer. ‖·‖ is the Frobenius norm, `rank` directions are looked at.",
        "",
        "| projection | rank | ‖ΔW‖ / ‖W‖ | effective rank | share of the first direction | amplification | ‖ΔW‖ / W in its own strongest directions |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for target, layers in modules.items():
        mean = lambda number: float(np.exp(np.mean([np.log(number(layer)) for layer in layers])))  # noqa: B023, E731
        ranks = sorted({layer["rank"] for layer in layers})
        lines.append(
            f"| {target} | {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'} "
            f"| {mean(lambda x: x['update_norm'] / x['base_norm']):.4f} | {mean(lambda x: x['effective_rank']):.1f} "
            f"| {mean(lambda x: (x['largest_value'] / x['update_norm']) ** 2):.0%} "
            f"| {mean(lambda x: x['amplification']):.1f} | {mean(lambda x: x['update_norm'] / x['base_through_base']):.2f} |"
        )
    everywhere = [layer for layers in modules.values() for layer in layers]
    strongest = max(everywhere, key=lambda layer: layer["update_norm"] / layer["base_norm"])
    used = np.mean([layer["effective_rank"] / len(layer["update"].values) for layer in everywhere])
    power = {name: sum(layer[name] ** 2 for layer in everywhere) ** 0.5 for name in COLUMNS if name.startswith("base_")}
    beside_random = power["base_through_update"] / power["base_through_random"]
    beside_own = power["base_through_update"] / power["base_through_base"]
    lines += [
        "",
        "- **Where**: the strongest update, relative to its kernel, is that of "
        f"`{strongest['projection']}` in layer {strongest['layer']} ({strongest['update_norm'] / strongest['base_norm']:.4f} of ‖W‖).",
        f"- **How many directions**: on average the effective rank is {used:.0%} of the directions there are. Singular values: `singular_values.png`.",
        "- **What is amplified** (paper, section 7.3): amplification is ‖ΔW‖ over the norm of W seen through ΔW's own "
        "directions. W is there, over all layers, "
        f"{beside_random:.1f} times as strong as through random directions, and {beside_own:.2f} times as strong as through its own strongest.",
    ]
    if shared:
        lines += ["", f"## Directions shared with `{FLAGS.other}`", ""]
        lines += [
            "φ(i, j) is 1 where the first i directions of one adapter and the first j of the other span the same space "
            "(section 7.2); two random spaces would have max(i, j) / in. Means over layers.",
            "",
            *common_start(),
            "| projection | of | φ(1, 1) | φ of all | random, of all |",
            "| --- | --- | --- | --- | --- |",
        ]
        for (target, of), maps in shared.items():
            first = np.mean([phi[0, 0] for phi in maps.values()])
            whole = np.mean([phi[-1, -1] for phi in maps.values()])
            size = len(modules[target][0]["update"].left)
            by_chance = np.mean([max(phi.shape) / size for phi in maps.values()])
            name = "ΔW" if of == "update" else of
            lines.append(f"| {target} | {name} | {first:.3f} | {whole:.3f} | {by_chance:.3f} |")
    return "\n".join(lines) + "\n"


def common_start() -> list[str]:
    """What to say where both runs drew their first lora_a from the same seed."""
    configs = [
        workdir.read_config(paths.path(folder))
        for folder in (FLAGS.adapter, FLAGS.other)
        if (paths.path(folder) / "config.json").is_file()
    ]
    if len(configs) < 2 or configs[0].seed != configs[1].seed:
        return []
    said = f"Both runs have seed {configs[0].seed}: where their ranks are equal they began with the very same lora_a, and what"
    return [f"{said} they share there says little. Compare runs with different seeds.", ""]


if __name__ == "__main__":
    cli.run(main)
