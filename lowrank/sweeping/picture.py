"""sweep.png: what rank, learning rate and the rest of a sweep do to the loss, with full fine-tuning beside it.

Up to three panels: the loss over rank (or over what is swept instead), the evaluations over steps, the loss over the
learning rate. Points are means over seeds, bars are sample standard deviations. A setting in which a seed diverged is
not drawn: the mean of its other seeds would flatter it.
"""

import functools
import math
import pathlib
import statistics
import textwrap

from lowrank.files.lines import writing
from lowrank.sweeping.ranking import (
    RANK,
    RATE,
    SEED,
    TARGETS,
    Result,
    Setting,
    adapted_and_baseline,
    best_rates,
    by_values,
    held_out,
    is_number,
    loss_name,
    rank_settings,
    swept_keys,
    values_of,
)
from lowrank.sweeping.tables import show_key, show_value, show_values

MARKERS = "osD^vPX*<>dp"
DASHES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 3)))
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito's, for what has no order
BASELINE = {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 1.6, "zorder": 3}


def write_picture(file: pathlib.Path, results: list[Result], title: str):
    figure = draw(results)
    figure.suptitle(_plain(title))
    with writing(file):
        figure.savefig(file, dpi=120)
    _pyplot().close(figure)


def draw(results: list[Result]):
    """The figure; whoever asks for it closes it."""
    settings = [setting for setting in rank_settings(results) if setting.sound]
    adapted, baseline = adapted_and_baseline(settings)
    keys = [key for key in swept_keys(results) if key != SEED and len(values_of(key, adapted)) > 1]
    across = RANK if RANK in keys else next((key for key in keys if key != RATE), None)
    variants = [key for key in keys if key not in (across, RATE)]
    lines = by_values(adapted, [across, *variants] if across else [])  # over rates, each with its best setting first
    baselines = best_rates(baseline)
    style_of = _styles(adapted, across, variants)

    panels = {}
    if settings and (across or not (held_out(results) or RATE in keys)):
        panels["across"] = functools.partial(_draw_across, across=across, variants=variants)
    if settings and held_out(results):
        panels["curves"] = functools.partial(_draw_curves, style_of=style_of, with_rate=RATE in keys)
    if RATE in keys:
        panels["rates"] = functools.partial(_draw_rates, style_of=style_of)
    count = max(1, len(panels))
    figure, axes = _pyplot().subplots(
        1, count, figsize=(5 * count + (count == 1), 5.6), layout="constrained", squeeze=False
    )
    if not panels:
        axes[0, 0].set_axis_off()
    bottom, top = _limits([group[0] for group in (*lines, *baselines)], settings)
    notes = _notes(results, settings, with_bars=set(panels) > {"curves"} or "curves" not in panels)
    for letter, (name, panel), axis in zip("abc", panels.items(), axes[0], strict=False):
        panel(axis, lines, baselines)
        if name == "curves":
            notes += _limit_curves(axis, f"({letter})" if count > 1 else "the panel")
        else:
            axis.set_ylim(bottom, top)
            notes += [note for note in _mark_points_above(axis, top) if note not in notes]
        axis.set_title(f"({letter}) {axis.get_title()}" if count > 1 else axis.get_title(), fontsize=11)
        axis.set_ylabel(f"{loss_name(results)} (nats per token)")
        axis.grid(alpha=0.25)
        _legend(axis, across, variants if name != "across" else [], lines, style_of)
    figure.supxlabel("; ".join(notes), fontsize=9, color="0.25")
    return figure


def _pyplot():
    import matplotlib

    matplotlib.use("agg")  # no display is needed, nor looked for
    from matplotlib import pyplot

    return pyplot


# ---- Panels ----------------------------------------------------------------------------------------------------------


def _draw_across(axis, lines, baselines, *, across: str | None, variants: list[str]):
    """A line for each rate; where more than rank and rate is swept, for each of that, a point at its own best rate."""
    settings = [setting for group in lines for setting in group]
    position = _across_axis(axis, across, settings)
    if variants:
        groups = by_values([group[0] for group in lines], variants)
        axis.set_title(f"over {_name(across)}, each at its best rate")
    else:
        groups = by_values(settings, [RATE])
        axis.set_title(f"over {_name(across)}")
    shades = COLOURS if variants else _shades("plasma", len(groups), 0.8)
    for i, group in enumerate(groups):
        colour, marker, dash = (of[i % len(of)] for of in (shades, MARKERS, DASHES))
        label = _words(group[0], variants or [RATE]) or _kind(group[0])
        _draw_line(axis, {position(one): one for one in group}, label, color=colour, marker=marker, linestyle=dash)
    for baseline in _best_of(baselines):
        axis.axhline(baseline.mean, label=_baseline_name(baseline), **BASELINE)
        if baseline.deviation:
            band = (baseline.mean - baseline.deviation, baseline.mean + baseline.deviation)
            axis.axhspan(*band, color="black", alpha=0.1, linewidth=0)


def _draw_curves(axis, lines, baselines, *, style_of, with_rate: bool):
    """The evaluations of each line's best setting."""
    for best in [group[0] for group in lines]:
        rate = f" ({show_value(RATE, best.values[RATE])})" if with_rate else ""
        style = style_of(best)
        label = style.pop("label") + rate
        curve = _mean_curve(best)
        axis.plot(*curve, label=label, markersize=5, markevery=max(1, len(curve[0]) // 10), **style)
    for baseline in _best_of(baselines):
        axis.plot(*_mean_curve(baseline), label=_baseline_name(baseline), **BASELINE)
    axis.set(xlabel="step", title="over steps" + ", each at its best rate" * any(len(group) > 1 for group in lines))


def _draw_rates(axis, lines, baselines, *, style_of):
    for group in lines:
        style = style_of(group[0])
        label = style.pop("label")
        _draw_line(axis, {one.values[RATE]: one for one in group}, label, **style)
    for i, group in enumerate(baselines):
        at = {one.values[RATE]: one for one in group if RATE in one.values}
        named = show_values(group[0].without(RATE))
        label = f"full fine-tuning, {named}" if named else "full fine-tuning"
        _draw_line(axis, at, _plain(label), marker=MARKERS[-1 - i % len(MARKERS)], **BASELINE)
    rates = values_of(RATE, [one for group in (*lines, *baselines) for one in group])
    axis.set_xscale("log")
    _set_ticks(axis, rates, [math.log(rate) for rate in rates], [show_value(RATE, rate) for rate in rates])
    axis.set(xlabel="learning rate", title="over the learning rate")


def _draw_line(axis, at: dict[float, Setting], label: str, **style):
    xs = sorted(at)
    deviations = [at[x].deviation for x in xs]
    bars = {"yerr": [deviation or 0 for deviation in deviations]} if any(deviations) else {}
    style = {"linewidth": 1.4, "markersize": 5, "capsize": 2.5, "elinewidth": 0.9, **style}
    axis.errorbar(xs, [at[x].mean for x in xs], label=label, **bars, **style)


def _across_axis(axis, key: str | None, settings: list[Setting]):
    """Setting -> its place: to the base 2 for numbers above 0, else side by side. Sets the ticks to the values tried."""
    values = values_of(key, settings) if key else [None]
    names = [_plain(show_value(key, value)) if key else "" for value in values]
    axis.set_xlabel(_name(key))
    if all(is_number(value) and value > 0 for value in values):
        axis.set_xscale("log", base=2)
        _set_ticks(axis, values, [math.log(value) for value in values], names)
        return lambda setting: setting.values[key]
    _set_ticks(axis, range(len(values)), range(len(values)), names)
    axis.set_xlim(-0.5, len(values) - 0.5)
    return lambda setting: values.index(setting.values.get(key))


def _set_ticks(axis, places, seen_at, names: list[str]):
    """A tick for each value; where one stands so near to the last that was named that words would meet, no name."""
    from matplotlib.ticker import NullLocator

    shown, last = [], -math.inf
    near = (seen_at[-1] - seen_at[0]) / 12
    for at, name in zip(seen_at, names, strict=True):
        shown.append(name if at - last >= near else "")
        last = at if shown[-1] else last
    width = 50 // len(names)
    if max(map(len, shown)) > width:  # broken where it can be read
        parts = [textwrap.wrap(name.replace("+", "+ ").replace("/", "/ "), max(4, width)) for name in shown]
        shown = ["\n".join(line.replace("+ ", "+").replace("/ ", "/") for line in lines) for lines in parts]
    axis.set_xticks(list(places), shown)
    axis.xaxis.set_minor_locator(NullLocator())


# ---- What is shown of the loss ---------------------------------------------------------------------------------------


def _limits(best: list[Setting], settings: list[Setting]) -> tuple[float, float]:
    """All points; but if some lie far off, only what is near to the best of each line and the better half of all."""
    if not settings:
        return 0, 1
    means = sorted(one.mean for one in settings)
    lowest = min(one.mean - (one.deviation or 0) for one in settings)
    ends = [one.mean + (one.deviation or 0) for one in settings]
    highest = max(ends)
    matters = max(statistics.median(means), *(one.mean + (one.deviation or 0) for one in best)) - lowest
    if matters and highest - lowest > 4 * matters:
        highest = max(end for end in ends if end <= lowest + 3 * matters)
    margin = 0.05 * (highest - lowest) or 0.01
    return lowest - margin, highest + margin


def _mark_points_above(axis, top: float) -> list[str]:
    """An arrow for each, those of one place side by side."""
    from matplotlib.transforms import ScaledTranslation

    above: dict[float, list] = {}
    for line in (container.lines[0] for container in axis.containers):
        for x, y in line.get_xydata():
            if y > top:
                above.setdefault(float(x), []).append(line.get_color())
    for x, colours in above.items():
        for i, colour in enumerate(colours):
            aside = ScaledTranslation((i - (len(colours) - 1) / 2) * 0.09, 0, axis.figure.dpi_scale_trans)  # inches
            place = {"transform": axis.get_xaxis_transform() + aside, "clip_on": False, "zorder": 5}
            axis.plot([x], [0.97], marker="^", markersize=7, markeredgecolor="white", color=colour, **place)
    return ["▲ at the edge: the point lies above"] if above else []


def _limit_curves(axis, name: str) -> list[str]:
    """How a run begins is far above the differences that are looked for: its first half may leave the panel."""
    curves = [line.get_xydata() for line in axis.get_lines()]
    last = max(step for curve in curves for step, _ in curve)
    lowest = min(loss for curve in curves for _, loss in curve)
    late = max(loss for curve in curves for step, loss in curve if step >= last / 2 or step == curve[-1][0])
    margin = 0.05 * (late - lowest) or 0.01
    axis.set_ylim(lowest - margin, late + margin)
    begins_above = any(loss > late + margin for curve in curves for _, loss in curve)
    return [f"{name} leaves out how the curves begin"] if begins_above else []


def _mean_curve(setting: Setting) -> tuple[list[int], list[float]]:
    """At the steps that all seeds were evaluated at."""
    curves = [dict(member.finite_curve) for member in setting.members]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    return steps, [statistics.fmean(curve[step] for curve in curves) for step in steps]


def _notes(results: list[Result], settings: list[Setting], with_bars: bool) -> list[str]:
    notes = []
    seeds = sorted({len(one.losses) for one in settings if one.deviation is not None})
    if seeds:
        count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        notes.append(f"means over {count} seeds" + ", bars: ± one sample standard deviation" * with_bars)
    elif settings:
        notes.append("one seed of each setting: no deviation can be told")
    left_out = [member for one in rank_settings(results) if not one.sound for member in one.members]
    diverged = sum(member.diverged is not None for member in left_out)
    if diverged:
        notes.append(f"{diverged} diverged, not drawn")
    if len(left_out) > diverged:
        notes.append(f"not drawn for a seed of their setting without a loss: {len(left_out) - diverged}")
    return notes


# ---- Styles and names ------------------------------------------------------------------------------------------------


def _styles(adapted: list[Setting], across: str | None, variants: list[str]):
    """Setting -> colour by what panel (a) has across, marker and dashes by the variant (or, without any, by the same)."""
    values = values_of(across, adapted) if across else [None]
    others = [one[0].without(across, RATE) for one in by_values(adapted, variants)]
    shades = _shades("viridis", len(values), 0.85)

    def style_of(setting: Setting) -> dict:
        i = values.index(setting.values.get(across))
        j = others.index(setting.without(across, RATE)) if variants else i
        label = _words(setting, [across] if across else []) or _kind(setting)
        dash = DASHES[j % len(DASHES)]
        return {"color": shades[i], "marker": MARKERS[j % len(MARKERS)], "linestyle": dash, "label": label}

    return style_of


def _shades(name: str, count: int, last: float) -> list:
    """From dark to not too pale."""
    colours = _pyplot().get_cmap(name)
    return [colours(last * i / max(1, count - 1)) for i in range(count)]


def _legend(axis, across: str | None, variants: list[str], lines, style_of):
    """Below the panel. Lines of every rank and variant are too many to name: colours and markers are named apart."""
    from matplotlib.lines import Line2D

    handles, labels = axis.get_legend_handles_labels()
    if variants:
        baseline = {name: h for h, name in zip(handles, labels, strict=True) if name.startswith("full fine-tuning")}
        named = {}
        for best in (group[0] for group in lines):
            style = style_of(best)
            named.setdefault(style.pop("label"), Line2D([], [], color=style["color"], linewidth=4))
        for best in (group[0] for group in lines):
            style = style_of(best) | {"color": "0.35", "label": None}
            named.setdefault(_words(best, variants), Line2D([], [], **style))
        handles, labels = [*named.values(), *baseline.values()], [*named, *baseline]
    pairs = sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0].startswith("full fine-tuning"))
    labels, handles = zip(*pairs, strict=True)
    columns = next(
        count for count in (4, 3, 2, 1) if count == 1 or (count <= len(labels) and _width(labels, count) <= 66)
    )
    more_lines = max((label.get_text().count("\n") for label in axis.get_xticklabels()), default=0)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15 - 0.05 * more_lines)}
    axis.legend(handles, labels, **below, ncols=columns, fontsize=8.5, frameon=False)


def _width(labels: list[str], columns: int) -> int:
    """In letters, of a legend that is filled column by column."""
    tall, short = len(labels) % columns, len(labels) // columns
    heights = [short + 1] * tall + [short] * (columns - tall)
    ends = [sum(heights[: i + 1]) for i in range(columns)]
    return sum(8 + max(map(len, labels[end - height : end])) for end, height in zip(ends, heights, strict=True))


def _best_of(baselines: list[list[Setting]]) -> list[Setting]:
    return [min((group[0] for group in baselines), key=lambda one: one.mean)] if baselines else []


def _baseline_name(baseline: Setting) -> str:
    """With its best rate."""
    named = [show_value(RATE, baseline.values[RATE])] if RATE in baseline.values else []
    named += [show_values(baseline.without(RATE))] if baseline.without(RATE) else []
    return _plain(f"full fine-tuning ({', '.join(named)})" if named else "full fine-tuning")


def _words(setting: Setting, keys: list[str]) -> str:
    """The setting's values of these keys, short enough for a legend."""
    values = [(key, setting.values[key]) for key in keys if key in setting.values]
    return ", ".join(_plain(f"{_short(key)} {show_value(key, value)}".strip()) for key, value in values)


def _kind(setting: Setting) -> str:
    return "full fine-tuning" if setting.mode == "full" else "adapter"


def _short(key: str) -> str:
    return "" if key == TARGETS else "rate" if key == RATE else _name(key)


def _name(key: str | None) -> str:
    return show_key(key) if key else "one setting"


def _plain(text: str) -> str:
    """Neither mathematics nor longer than a legend can be: the end of a path tells more than its beginning."""
    text = text if len(text) <= 40 else "…" + text[-39:]
    return text.replace("$", r"\$")
