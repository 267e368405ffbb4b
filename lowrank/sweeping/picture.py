"""sweep.png: the loss over rank (or another swept key), over steps and over the learning rate, beside full fine-tuning.

Points are means over seeds, bars sample standard deviations. A setting in which a seed diverged is not drawn: the mean of
its other seeds would flatter it.
"""

import pathlib
import statistics
from typing import TYPE_CHECKING, Any

from lowrank.files import figure as figure_lib
from lowrank.sweeping import ranking
from lowrank.sweeping.ranking import RANK, RATE, SEED, Result, Setting
from lowrank.sweeping.tables import format_key, format_value, format_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*<>dp"
DASHES = ("-", "--", ":", "-.")


# Settings that differ only in the learning rate, the best one first, and how they are drawn.
Line = tuple[list[Setting], dict[str, Any]]


def write_picture(file: pathlib.Path, results: list[Result], title: str) -> None:
    figure = draw(results)
    figure.suptitle(_shorten(title))
    figure_lib.save(figure, file)


def draw(results: list[Result]) -> "Figure":
    """Up to three panels and, below them, notes on what the points are and what is left out."""
    settings = [setting for setting in ranking.rank_settings(results) if setting.complete]
    adapted, baseline = ranking.split_baseline(settings)
    keys = [key for key in ranking.list_keys(results) if key != SEED and len(ranking.list_values(key, adapted)) > 1]
    across = RANK if RANK in keys else next((key for key in keys if key != RATE), None)
    variants = [key for key in keys if key not in (across, RATE)]
    lines, baselines = _style_lines(adapted, across, variants), _style_baselines(baseline)
    best_baseline = sorted(baselines, key=lambda line: line[0][0].mean)[:1]

    with_steps, with_rates = ranking.has_held_out(results), RATE in keys
    with_across = bool(across) or not (with_steps or with_rates)
    count = with_across + with_steps + with_rates
    figure, ((*panels,),) = figure_lib.figure(1, count, figsize=(5 * count + 1, 5), squeeze=False)
    for axis in panels:
        axis.set_ylabel(f"{ranking.name_loss(results)} (nats per token)")
        axis.grid(alpha=0.25)
    if settings and with_across:
        _draw_across(panels[0], lines, best_baseline, across, variants)
    if settings and with_steps:
        _draw_steps(panels[with_across], [*lines, *best_baseline])
    if with_rates:
        _draw_rates(panels[-1], [*lines, *baselines])
    handles, labels = panels[-1].get_legend_handles_labels()
    if count > with_across and len(labels) > 1:
        figure.legend(handles, labels, loc="outside right upper", ncols=1 + len(labels) // 28, fontsize="small")
    with_seeds = any(setting.deviation is not None for setting in settings)
    notes = ["means over seeds, bars: ± one sample standard deviation" if with_seeds else "one seed of each setting"]
    if left_out := len(results) - sum(len(setting.members) for setting in settings):
        notes.append(f"not drawn: {left_out} members of settings in which a seed diverged or has no loss")
    if any(max(line.get_ydata()) > axis.get_ylim()[1] for axis in panels for line in axis.get_lines()):
        notes.append("lines that leave a panel at the top go on above it")
    figure.supxlabel("; ".join(notes), fontsize="small")
    return figure


def _draw_across(axis: "Axes", lines: list[Line], baselines: list[Line], across: str | None, variants: list[str]):
    """A line for each rate or, if more than rank and rate is swept, for each variant, with points at their best rates."""
    settings = [setting for line, _ in lines for setting in line]
    best = [line[0] for line, _ in lines]
    groups = ranking.group_by(best, variants) if variants else ranking.group_by(settings, [RATE])
    values: list[Any] = ranking.list_values(across, settings) if across else [None]
    on_scale = all(ranking.is_number(value) and value > 0 for value in values)
    if across and on_scale:
        _scale_log(axis, across, values, base=2)
    elif across:
        names = [_shorten(format_value(across, value)) for value in values]
        axis.set_xticks(range(len(values)), names, rotation=20, ha="right")
    for i, group in enumerate(groups):
        own = [one.values.get(across or "") for one in group]
        places = own if on_scale else [values.index(value) for value in own]
        style = {"color": _pick_colour("plasma", i, len(groups)), "marker": MARKERS[i % len(MARKERS)]}
        _draw_means(axis, dict(zip(places, group, strict=True)), label=_label(group[0], variants or [RATE]), **style)
    for line, style in baselines:
        mean, deviation = line[0].mean, line[0].deviation or 0
        axis.axhline(mean, color="black", linestyle="--", label=style["label"])
        axis.axhspan(mean - deviation, mean + deviation, color="black", alpha=0.1)
    name = format_key(across) if across else "one setting"
    axis.set(xlabel=name, title=f"over {name}" + ", each at its best rate" * bool(variants))
    _limit_means(axis, settings, [*lines, *baselines])
    if len(groups) + len(baselines) > 1:
        axis.legend(fontsize="small")


def _draw_steps(axis: "Axes", lines: list[Line]):
    """The evaluations of each line's best setting, as means at the steps that all of its seeds were evaluated at."""
    late = []
    for (best, *_), style in lines:
        curves = [dict(member.finite_curve) for member in best.members]
        steps = [step for step in curves[0] if all(step in curve for curve in curves)]
        losses = [statistics.fmean(curve[step] for curve in curves) for step in steps]
        axis.plot(steps, losses, markevery=max(1, len(steps) // 10), **style)
        late += [loss for step, loss in zip(steps, losses, strict=True) if step >= steps[-1] / 2]
    rates = any(len(line) > 1 for line, _ in lines)
    axis.set(xlabel="step", title="over steps" + ", each at its best rate" * rates)
    if len(lines) > 1:  # a run begins far above the differences between runs
        _limit(axis, late)


def _draw_rates(axis: "Axes", lines: list[Line]):
    settings = [setting for line, _ in lines for setting in line if RATE in setting.values]
    _scale_log(axis, RATE, ranking.list_values(RATE, settings), base=10)
    for line, style in lines:
        _draw_means(axis, {one.values[RATE]: one for one in line if RATE in one.values}, **style)
    axis.set(xlabel="learning rate", title="over the learning rate")
    _limit_means(axis, settings, lines)


def _draw_means(axis: "Axes", points: dict[Any, Setting], **style):
    xs = sorted(points)
    deviations = [points[x].deviation or 0 for x in xs]
    axis.errorbar(xs, [points[x].mean for x in xs], yerr=deviations if any(deviations) else None, capsize=2.5, **style)


def _scale_log(axis: "Axes", key: str, values: list, base: int):
    """A logarithmic axis with a tick at each value tried."""
    axis.set_xscale("log", base=base)
    axis.set_xticks(values, [format_value(key, value) for value in values], rotation=45 if len(values) > 8 else 0)
    axis.minorticks_off()


def _limit_means(axis: "Axes", settings: list[Setting], lines: list[Line]):
    """Show each line's best and the better half of all; far outliers (a rate too high) would flatten the differences."""
    ends = [one.mean + sign * (one.deviation or 0) for one in settings for sign in (-1, 1)]
    best = [line[0].mean + (line[0].deviation or 0) for line, _ in lines]
    matters = max(statistics.median(one.mean for one in settings), *best) - min(ends)
    _limit(axis, [end for end in ends if end <= min(ends) + 3 * matters])


def _limit(axis: "Axes", losses: list[float]):
    margin = 0.05 * (max(losses) - min(losses)) or 0.01
    axis.set_ylim(min(losses) - margin, max(losses) + margin)


def _style_lines(settings: list[Setting], across: str | None, variants: list[str]) -> list[Line]:
    """Colour by the value of `across`, dashes by the variant, marker by the variant or, without any, by the value."""
    keys = [across, *variants] if across else []
    groups = ranking.group_by(settings, keys)
    best = [group[0] for group in groups]
    values = ranking.list_values(across, best) if across else [None]
    kinds = [same[0].without(across, RATE) for same in ranking.group_by(best, variants)]
    lines = []
    for group in groups:
        value, kind = values.index(group[0].values.get(across or "")), kinds.index(group[0].without(across, RATE))
        style = {"color": _pick_colour("viridis", value, len(values)), "linestyle": DASHES[kind % len(DASHES)]}
        marker = MARKERS[(kind if variants else value) % len(MARKERS)]
        lines.append((group, style | {"marker": marker, "label": _label(group[0], keys)}))
    return lines


def _style_baselines(settings: list[Setting]) -> list[Line]:
    lines = []
    for i, group in enumerate(ranking.group_rates(settings)):
        style = {"color": "black", "linestyle": "--", "marker": MARKERS[-1 - i % len(MARKERS)], "zorder": 3}
        lines.append((group, style | {"label": _shorten(format_values(group[0].without(RATE), "full"))}))
    return lines


def _pick_colour(name: str, i: int, count: int) -> tuple:
    """The i-th of `count` colours, from dark to not too pale."""
    import matplotlib

    return matplotlib.colormaps[name](0.85 * i / max(1, count - 1))


def _label(setting: Setting, keys: list[str]) -> str:
    values = {key: setting.values[key] for key in keys if key in setting.values}
    return _shorten(format_values(values)) or ("full fine-tuning" if setting.mode == "full" else "adapter")


def _shorten(text: str) -> str:
    """At most 40 characters, of which the last say most (paths); `$` is not mathematics."""
    return (text if len(text) <= 40 else "…" + text[-39:]).replace("$", r"\$")
