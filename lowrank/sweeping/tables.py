"""The tables of a sweep: sweep.csv has every member, sweep.md says what was found and shows settings and members."""

import csv
import io
import math
import pathlib
from typing import Any

from lowrank.families.config import ATTENTION, MLP
from lowrank.files.lines import replace
from lowrank.formatting import format_bytes, format_number
from lowrank.sweeping import ranking
from lowrank.sweeping.ranking import MODE, RANK, RATE, SEED, TARGETS, Result, Setting

NAMES = {RANK: "rank", RATE: "learning rate", TARGETS: "targets"}  # other keys are called as in the config
NOTHING = "–"

# ---- Names and numbers -----------------------------------------------------------------------------------------------


def format_key(key: str) -> str:
    return NAMES.get(key, key)


def format_value(key: str, value: Any) -> str:
    if key == TARGETS and value and not isinstance(value, str):
        for targets, name in ((ATTENTION + MLP, "all seven"), (ATTENTION, "attention"), (MLP, "MLP")):
            if sorted(value) == sorted(targets):
                return name
        return "+".join(value)
    if key == RATE:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def format_values(values: dict[str, Any]) -> str:
    return ", ".join(f"{format_key(key)} {format_value(key, value)}" for key, value in values.items())


def format_setting(setting: Setting) -> str:
    """Such as "rank 8, learning rate 3e-4"."""
    kind = "full fine-tuning, " if setting.mode == "full" else ""
    return (kind + format_values(setting.values)).removesuffix(", ") or "the only setting"


def format_loss(loss: float | None) -> str:
    if loss is None or math.isnan(loss):
        return NOTHING
    return f"{loss:.4f}" if abs(loss) < 1000 else f"{loss:.4g}"


def format_mean(setting: Setting) -> str:
    return " ± ".join(format_loss(loss) for loss in (setting.mean, setting.deviation) if loss is not None)


def format_perplexity(loss: float | None) -> str:
    if loss is None or math.isnan(loss):
        return NOTHING
    perplexity = ranking.perplexity(loss)
    return f"{perplexity:.3f}" if perplexity < 1000 else format_number(perplexity)


# ---- sweep.csv -------------------------------------------------------------------------------------------------------


def write_csv(file: pathlib.Path, results: list[Result]) -> None:
    """A row for each member, the best first; a number has all its digits, and a key that a member lacks is empty."""
    rows: list[dict[str, Any]] = []
    for result in ranking.rank_members(results):
        swept, (best_step, best_loss) = result.swept | {MODE: result.mode}, result.best
        row: dict[str, Any] = {
            "name": result.name,
            **{key: _csv_cell(swept.get(key, "")) for key in ranking.list_keys(results)},
        }
        row |= {"eval/loss": result.loss, "eval/perplexity": result.perplexity}
        row |= {"eval/best_loss": best_loss, "eval/best_step": best_step, "train/loss": result.train_loss}
        if ranking.has_answers(results):
            row["eval/exact_match"] = result.exact_match
        row |= {"trainable_parameters": result.trainable, "adapter_bytes": result.adapter_bytes}
        rows.append(row | {"steps": result.steps, "diverged_at": result.diverged})
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace(file, text.getvalue())


def _csv_cell(value: Any) -> str:
    """As the command line takes it."""
    if isinstance(value, tuple) and value and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return str(value)


# ---- sweep.md --------------------------------------------------------------------------------------------------------


def describe(results: list[Result], title: str) -> str:
    """The page: what was found, the settings, the best rate of each, the diverged members, every member."""
    settings = ranking.rank_settings(results)
    parts = [
        f"# {title}",
        " ".join(_summarize(results, settings)),
        "![the loss over what was swept](sweep.png)",
        f"## Settings\n\n{_settings_table(results, settings)}",
    ]
    if len(ranking.list_values(RATE, settings)) > 1:
        rest = [format_key(key) for key in ranking.list_keys(results) if key not in (RATE, SEED, MODE)]
        each = f" for each {' x '.join(rest)}" if rest else ""
        parts.append(f"## Best rate{each}\n\n{_best_rates_table(results, settings)}")
    diverged = [member for member in ranking.rank_members(results) if member.diverged is not None]
    if diverged:
        parts.append("## Diverged\n\n" + "\n".join(f"- `{one.name}` at step {one.diverged:,}" for one in diverged))
    parts.append(f"## Members\n\n{_members_table(results)}")
    return "\n\n".join(parts) + "\n"


def _summarize(results: list[Result], settings: list[Setting]) -> list[str]:
    """Sentences that claim no more than the seeds can show."""
    members, loss = _count(len(results), "member"), ranking.name_loss(results)
    said = [f"Ranked by the {loss}: {members} in {_count(len(settings), 'setting')}."]
    if not ranking.has_held_out(results):
        said.append("Nothing is held out: the training loss is that of one batch, and says little about other text.")
    if diverged := sum(setting.diverged for setting in settings):
        said.append(f"{diverged:,} of {members} diverged.")
    complete = [setting for setting in settings if setting.complete]
    if not complete:
        return [*said, "In every setting a seed has no loss, so no setting is best."]
    best, seeds = complete[0], _count(len(complete[0].losses), "seed")
    said.append(f"The best setting is {format_setting(best)}: {format_mean(best)} ({seeds}).")
    at_best_rates = [group[0] for group in ranking.group_rates(complete)]
    noise = ranking.pool_deviation(at_best_rates)
    if len(complete) == 1:
        return said
    if noise is None:
        return [*said, "With one seed of each setting, small differences may be chance."]
    pooled = "pooled over settings at their best rates"
    said.append(f"Over seeds, the standard deviation is {format_loss(noise)} ({pooled}).")
    close = sum(setting.mean - best.mean <= noise for setting in complete[1:])
    next_ones = f"{_count(close, 'other setting')} (next in the table) cannot be told apart from the best."
    said.append(f"By that measure, {next_ones}" if close else "No other setting is that close to the best.")
    return said + _judge_ranks([setting for setting in at_best_rates if RANK in setting.values])


def _judge_ranks(settings: list[Setting]) -> list[str]:
    """Which rank is enough: the smallest within one standard deviation of the best. `settings`: each at its best rate."""
    if not settings:
        return []
    best = min(settings, key=lambda setting: setting.mean)
    rest = best.without(RANK, RATE)  # compared are ranks with all else equal
    ranks = [one for one in settings if one.mode == best.mode and one.without(RANK, RATE) == rest]
    ranks.sort(key=lambda setting: setting.values[RANK])
    noise = ranking.pool_deviation(ranks)
    with_rest = f" (with {format_values(rest)})" if rest else ""
    if len(ranks) == 1 or noise is None:
        return []
    within = f"one standard deviation ({format_loss(noise)}, pooled over these ranks)"
    smallest = next(one for one in ranks if one.mean - best.mean <= noise)
    if smallest is not best:
        return [
            f"Rank {smallest.values[RANK]} is enough{with_rest}: it is within {within} of rank {best.values[RANK]}, the best."
        ]
    if best is ranks[0]:
        return [f"The smallest rank, {best.values[RANK]}, is also the best{with_rest}."]
    largest = f" Rank {best.values[RANK]} is the largest tried: extend the grid." if best is ranks[-1] else ""
    return [f"No rank below {best.values[RANK]} is enough{with_rest}: none is within {within} of it.{largest}"]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


# ---- Tables: each row a dict from its columns' names to cells -------------------------------------------------------


def _settings_table(results: list[Result], settings: list[Setting]) -> str:
    keys = [key for key in ranking.list_keys(results) if key != SEED]
    return _format_table(
        [
            {"": str(place), **_format_cells(one.values | {MODE: one.mode}, keys), **_loss_cells(results, one)}
            for place, one in enumerate(settings, start=1)
        ]
    )


def _best_rates_table(results: list[Result], settings: list[Setting]) -> str:
    keys = [key for key in ranking.list_keys(results) if key not in (SEED, RATE)]
    groups, rows = ranking.group_rates(settings), []
    for group in groups:
        best, edge = group[0], ranking.find_edge(group)
        row = _format_cells(best.values | {MODE: best.mode}, keys)
        (row["best rate"],) = _format_cells(best.values if best.complete else {}, [RATE]).values()
        if any(ranking.find_edge(other) for other in groups):
            row["at the edge"] = f"{edge} tried" if edge else ""
        rows.append(row | _loss_cells(results, best))
    return _format_table(rows)


def _loss_cells(results: list[Result], setting: Setting) -> dict[str, str]:
    loss = "diverged" if setting.diverged == len(setting.members) else format_mean(setting)
    cells = {ranking.name_loss(results): loss, "seeds": f"{len(setting.losses)}"}
    if not setting.complete:
        cells["seeds"] += f" of {len(setting.members)}"
    if ranking.has_held_out(results):
        cells["perplexity"] = format_perplexity(setting.mean)
    member = setting.members[0]
    return cells | {"trainable parameters": f"{member.trainable:,}", "bytes": format_bytes(member.adapter_bytes)}


def _members_table(results: list[Result]) -> str:
    rows = []
    for place, member in enumerate(ranking.rank_members(results), start=1):
        row = {"": str(place), "member": f"`{member.name}`"}
        row |= _format_cells(member.swept | {MODE: member.mode}, ranking.list_keys(results))
        if ranking.has_held_out(results):
            step, loss = member.best
            row |= {"held-out loss": format_loss(member.loss), "perplexity": format_perplexity(member.loss)}
            row |= {"best": format_loss(loss), "at step": NOTHING if step is None else f"{step:,}"}
        row["training loss"] = format_loss(member.train_loss)
        if ranking.has_answers(results):
            row["exact match"] = NOTHING if member.exact_match is None else f"{member.exact_match:.3f}"
        row["steps"] = f"{member.steps:,}" + (" (diverged)" if member.diverged is not None else "")
        rows.append(row)
    return _format_table(rows)


def _format_cells(values: dict[str, Any], keys: list[str]) -> dict[str, str]:
    return {format_key(key): format_value(key, values[key]) if key in values else NOTHING for key in keys}


def _format_table(rows: list[dict[str, str]]) -> str:
    """Markdown that reads as plain text, too: columns padded, columns of numbers aligned right."""
    columns = [[cell.replace("|", r"\|") for cell in (name, *(row[name] for row in rows))] for name in rows[0]]
    for i, (name, *cells) in enumerate(columns):
        width = max(3, *map(len, (name, *cells)))
        # Losses are aligned left: their points then stand below each other, with and without a deviation.
        right = all(cell[:1].isdigit() or cell == NOTHING for cell in cells) and not any("±" in cell for cell in cells)
        rule = "-" * (width - 1) + ":" if right else "-" * width
        columns[i] = [cell.rjust(width) if right else cell.ljust(width) for cell in (name, *cells)]
        columns[i].insert(1, rule)
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
