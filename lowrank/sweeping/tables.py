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


def format_key(key: str) -> str:
    return NAMES.get(key, key)


def format_value(key: str, value: Any) -> str:
    if key == TARGETS and value and not isinstance(value, str):
        sets = {"all seven": ATTENTION + MLP, "attention": ATTENTION, "MLP": MLP}
        return next((name for name, targets in sets.items() if sorted(value) == sorted(targets)), "+".join(value))
    if key == RATE:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def format_values(values: dict[str, Any], mode: str = "lora") -> str:
    """Such as "rank 8, learning rate 3e-4", after "full fine-tuning" in mode "full"."""
    parts = [f"{format_key(key)} {format_value(key, value)}" for key, value in values.items()]
    return ", ".join(["full fine-tuning"] * (mode == "full") + parts)


def format_loss(loss: float | None) -> str:
    if loss is None or math.isnan(loss):
        return NOTHING
    return f"{loss:.4f}" if abs(loss) < 1000 else f"{loss:.4g}"


def format_perplexity(loss: float | None) -> str:
    if loss is None or math.isnan(loss):
        return NOTHING
    perplexity = ranking.perplexity(loss)
    return f"{perplexity:.3f}" if perplexity < 1000 else format_number(perplexity)


def format_mean(setting: Setting) -> str:
    return " ± ".join(format_loss(loss) for loss in (setting.mean, setting.deviation) if loss is not None)


def write_csv(file: pathlib.Path, results: list[Result]) -> None:
    """A row for each member, the best first; a number has all its digits, and a key that a member lacks is empty."""
    rows: list[dict[str, Any]] = []
    with_answers = any(result.exact_match is not None for result in results)
    for result in ranking.rank_members(results):
        row: dict[str, Any] = {"name": result.name}
        for key in ranking.list_keys(results):
            value = (result.swept | {MODE: result.mode}).get(key, "")
            named = isinstance(value, tuple) and value and all(isinstance(item, str) for item in value)
            row[key] = ",".join(value) if named else str(value)  # as the command line takes it
        best_step, best_loss = result.best
        row |= {"eval/loss": result.loss, "eval/perplexity": result.perplexity}
        row |= {"eval/best_loss": best_loss, "eval/best_step": best_step, "train/loss": result.train_loss}
        row |= {"eval/exact_match": result.exact_match} if with_answers else {}
        row |= {"trainable_parameters": result.trainable, "adapter_bytes": result.adapter_bytes}
        rows.append(row | {"steps": result.steps, "diverged_at": result.diverged})
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace(file, text.getvalue())


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
    members = _count(len(results), "member")
    said = [f"Ranked by the {ranking.name_loss(results)}: {members} in {_count(len(settings), 'setting')}."]
    if not ranking.has_held_out(results):
        said.append("Nothing is held out: the training loss is that of one batch, and says little about other text.")
    if diverged := sum(setting.diverged for setting in settings):
        said.append(f"{diverged:,} of {members} diverged.")
    complete = [setting for setting in settings if setting.complete]
    if not complete:
        return [*said, "In every setting a seed has no loss, so no setting is best."]
    best, *others = complete
    name = format_values(best.values, best.mode) or "the only setting"
    said.append(f"The best setting is {name}: {format_mean(best)} ({_count(len(best.losses), 'seed')}).")
    if not others:
        return said
    at_best_rates = [group[0] for group in ranking.group_rates(complete)]
    noise = ranking.pool_deviation(at_best_rates)
    if noise is None:
        return [*said, "With one seed of each setting, small differences may be chance."]
    said.append(
        f"Over seeds, the standard deviation is {format_loss(noise)} (pooled over settings at their best rates)."
    )
    if close := sum(setting.mean - best.mean <= noise for setting in others):
        equals = _count(close, "other setting")
        said.append(f"By that measure, {equals} (next in the table) cannot be told apart from the best.")
    else:
        said.append("No other setting is that close to the best.")
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
    if len(ranks) == 1 or noise is None:
        return []
    rank, where = best.values[RANK], f" (with {format_values(rest)})" if rest else ""
    within = f"within one standard deviation ({format_loss(noise)}, pooled over these ranks)"
    smallest = next(one for one in ranks if one.mean - best.mean <= noise)
    if smallest is not best:
        return [f"Rank {smallest.values[RANK]} is enough{where}: it is {within} of rank {rank}, the best."]
    if best is ranks[0]:
        return [f"The smallest rank, {rank}, is also the best{where}."]
    largest = f" Rank {rank} is the largest tried: extend the grid." if best is ranks[-1] else ""
    return [f"No rank below {rank} is enough{where}: none is {within} of it.{largest}"]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _settings_table(results: list[Result], settings: list[Setting]) -> str:
    keys = [key for key in ranking.list_keys(results) if key != SEED]
    rows = [_value_cells(one.values, one.mode, keys) | _loss_cells(results, one) for one in settings]
    return _format_table([{"": str(place)} | row for place, row in enumerate(rows, start=1)])


def _best_rates_table(results: list[Result], settings: list[Setting]) -> str:
    keys = [key for key in ranking.list_keys(results) if key not in (SEED, RATE)]
    rows = []
    for best, *others in ranking.group_rates(settings):
        row, rates = _value_cells(best.values, best.mode, keys), ranking.list_values(RATE, [best, *others])
        rate = best.values.get(RATE) if best.complete else None
        row["best rate"] = NOTHING if rate is None else format_value(RATE, rate)
        at_edge = {rates[0]: "smallest tried", rates[-1]: "largest tried"}.get(rate, "") if len(rates) > 1 else ""
        rows.append(row | {"at the edge": at_edge} | _loss_cells(results, best))
    if not any(row["at the edge"] for row in rows):
        rows = [{name: cell for name, cell in row.items() if name != "at the edge"} for row in rows]
    return _format_table(rows)


def _members_table(results: list[Result]) -> str:
    rows = []
    with_answers = any(result.exact_match is not None for result in results)
    for place, member in enumerate(ranking.rank_members(results), start=1):
        row = {"": str(place), "member": f"`{member.name}`"}
        row |= _value_cells(member.swept, member.mode, ranking.list_keys(results))
        if ranking.has_held_out(results):
            step, loss = member.best
            row |= {"held-out loss": format_loss(member.loss), "perplexity": format_perplexity(member.loss)}
            row |= {"best": format_loss(loss), "at step": NOTHING if step is None else f"{step:,}"}
        row["training loss"] = format_loss(member.train_loss)
        if with_answers:
            row["exact match"] = NOTHING if member.exact_match is None else f"{member.exact_match:.3f}"
        row["steps"] = f"{member.steps:,}" + " (diverged)" * (member.diverged is not None)
        rows.append(row)
    return _format_table(rows)


def _value_cells(values: dict[str, Any], mode: str, keys: list[str]) -> dict[str, str]:
    values = values | {MODE: mode}
    return {format_key(key): format_value(key, values[key]) if key in values else NOTHING for key in keys}


def _loss_cells(results: list[Result], setting: Setting) -> dict[str, str]:
    loss = "diverged" if setting.diverged == len(setting.members) else format_mean(setting)
    seeds = f"{len(setting.losses)}" + f" of {len(setting.members)}" * (not setting.complete)
    cells = {ranking.name_loss(results): loss, "seeds": seeds}
    if ranking.has_held_out(results):
        cells["perplexity"] = format_perplexity(setting.mean)
    member = setting.members[0]
    return cells | {"trainable parameters": f"{member.trainable:,}", "bytes": format_bytes(member.adapter_bytes)}


def _format_table(rows: list[dict[str, str]]) -> str:
    """Markdown that reads as plain text, too: columns padded, columns of numbers aligned right."""
    columns = []
    for name in rows[0]:
        cells = [row[name].replace("|", r"\|") for row in rows]
        width = max(3, *map(len, (name, *cells)))
        # Losses are aligned left: their points then stand below each other, with and without a deviation.
        right = all(cell[:1].isdigit() or cell == NOTHING for cell in cells) and not any("±" in cell for cell in cells)
        rule = "-" * (width - 1) + ":" if right else "-" * width
        columns.append([f"{cell:{'>' if right else '<'}{width}}" for cell in (name, rule, *cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
