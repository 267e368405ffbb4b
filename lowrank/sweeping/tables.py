"""The tables of a sweep: every member for machines (sweep.csv), and sweep.md, which says in words what was found."""

import csv
import io
import math
import pathlib

from lowrank import formatting
from lowrank.families.config import ATTENTION, MLP
from lowrank.files import lines as lines_lib
from lowrank.formatting import format_bytes
from lowrank.sweeping.ranking import (
    MODE,
    RANK,
    RATE,
    SEED,
    TARGETS,
    Result,
    Setting,
    adapted_and_baseline,
    best_rates,
    edge,
    held_out,
    loss_name,
    loss_of,
    perplexity,
    pooled_deviation,
    rank_members,
    rank_settings,
    swept_keys,
    values_of,
)

NAMES = {RANK: "rank", RATE: "learning rate", TARGETS: "targets"}  # for people; other keys are called as in the config
NOTHING = "–"

# ---- Names and numbers for people ------------------------------------------------------------------------------------


def show_key(key: str) -> str:
    return NAMES.get(key, key)


def show_value(key: str, value) -> str:
    if key == TARGETS and value and not isinstance(value, str):
        for targets, name in ((ATTENTION + MLP, "all seven"), (ATTENTION, "attention"), (MLP, "MLP")):
            if sorted(value) == sorted(targets):
                return name
        return "+".join(value)
    if key == RATE:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_values(values: dict[str, object]) -> str:
    return ", ".join(f"{show_key(key)} {show_value(key, value)}" for key, value in values.items())


def show_setting(setting: Setting, *without: str) -> str:
    """Such as "rank 8, learning rate 3e-4"."""
    named = show_values(setting.without(*without))
    if setting.mode == "full":
        return f"full fine-tuning, {named}" if named else "full fine-tuning"
    return named or "one setting"


def show_loss(loss: float | None) -> str:
    if loss is None:
        return NOTHING
    return f"{loss:.4f}" if abs(loss) < 1000 else f"{loss:.4g}"


def show_mean(setting: Setting) -> str:
    deviation = "" if setting.deviation is None else f" ± {show_loss(setting.deviation)}"
    return show_loss(setting.mean) + deviation


def show_perplexity(loss: float | None) -> str:
    if loss is None:
        return NOTHING
    return f"{perplexity(loss):.3f}" if loss < math.log(1000) else formatting.format_number(perplexity(loss))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


# ---- The table for machines ------------------------------------------------------------------------------------------


def write_csv(file: pathlib.Path, results: list[Result]):
    """A row for each member, the best first; a number has all its digits, and a key that a member lacks is empty."""
    keys = swept_keys(results)
    columns = ["name", *keys]
    with_mode = any(result.mode == "full" for result in results)
    with_matches = any(result.exact_match is not None for result in results)
    columns += [MODE] * with_mode
    columns += ["eval/loss", "eval/perplexity", "eval/best_loss", "eval/best_step", "train/loss"]
    columns += ["eval/exact_match"] * with_matches
    columns += ["trainable_parameters", "adapter_bytes", "steps", "diverged_at"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for result in rank_members(results):
        row = [result.name, *(_cell(result.swept[key]) if key in result.swept else "" for key in keys)]
        row += [result.mode] * with_mode
        row += [result.loss, result.perplexity, result.best_loss, result.best_step, result.train_loss]
        row += [result.exact_match] * with_matches
        row += [result.trainable, result.adapter_bytes, result.steps, result.diverged]
        writer.writerow(row)
    lines_lib.replace(file, text.getvalue())


def _cell(value) -> str:
    """As the command line takes it."""
    if isinstance(value, (tuple, list)) and value and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return str(value)


# ---- The page for people ---------------------------------------------------------------------------------------------


def describe(results: list[Result], title: str) -> str:
    """sweep.md: what was found in words, then settings, the best rate for each, the diverged, every member."""
    settings = rank_settings(results)
    parts = [
        f"# {title}",
        _found(results, settings),
        "![the loss over what was swept](sweep.png)",
        f"## Settings\n\n{_settings_table(results, settings)}",
    ]
    if len(values_of(RATE, settings)) > 1:
        rest = [show_key(key) for key in swept_keys(results) if key not in (RATE, SEED)]
        each = f" for each {' x '.join(rest)}" if rest else ""
        parts.append(f"## Best rate{each}\n\n{_best_rates_table(results, settings)}")
    if any(setting.diverged for setting in settings):
        parts.append(f"## Diverged\n\n{_diverged(results, settings)}")
    parts.append(f"## Members\n\n{_members_table(results)}")
    return "\n\n".join(parts) + "\n"


def _found(results: list[Result], settings: list[Setting]) -> str:
    """The paragraph. It claims no more than the seeds can carry."""
    best_member, sound = rank_members(results)[0], [setting for setting in settings if setting.sound]
    said = []
    if not held_out(results):
        said.append(
            "Nothing is held out, so all is ranked by the training loss of the last logged step: it is of one batch, "
            "and says little about other text."
        )
    if not any(setting.losses for setting in settings):
        return " ".join([*said, f"None of the {_count(len(results), 'member')} has a loss: nothing can be ranked."])
    perplex = f" (perplexity {show_perplexity(best_member.loss)})" if held_out(results) else ""
    loss = loss_of(best_member, held_out(results))
    said.append(
        f"The best of {_count(len(results), 'member')} is `{best_member.name}` with a {loss_name(results)} of "
        f"{show_loss(loss)} nats per token{perplex}."
    )
    if not sound:
        said.append("In every setting a seed diverged or has no loss: no setting is best.")
    else:
        said += _best_setting(sound)
        adapted, baseline = adapted_and_baseline(settings)
        groups = best_rates(adapted)
        ranking = [group for group in groups if group[0].sound]
        if ranking:
            best = min(ranking, key=lambda group: group[0].mean)
            if best[0] is not sound[0]:
                said.append(f"The best adapter is {show_setting(best[0])}: {show_mean(best[0])}.")
            said += _smallest_rank(best[0], [group[0] for group in groups])
            said += _best_rate(best, groups)
            said += _beside_baseline(best[0], best_rates(baseline))
    diverged = sum(setting.diverged for setting in settings)
    if diverged:
        said.append(f"{diverged:,} of {_count(len(results), 'member')} diverged.")
    return " ".join(said)


def _best_setting(sound: list[Setting]) -> list[str]:
    best, several = sound[0], any(len(setting.losses) > 1 for setting in sound)
    if len(sound) == 1:
        which = "" if not best.values and best.mode != "full" else f" ({show_setting(best)})"
        return [f"There is only one setting to judge{which}: {show_mean(best)} ({_count(len(best.losses), 'seed')})."]
    if not several:
        return [
            f"The best setting is {show_setting(best)}. There is one seed of each, so no deviation can be told: "
            "small differences may be chance."
        ]
    seeds = "one seed, so no deviation can be told" if len(best.losses) == 1 else f"{len(best.losses)} seeds"
    return [f"Over seeds, the best setting is {show_setting(best)}: {show_mean(best)} ({seeds})."]


def _smallest_rank(best: Setting, ranking: list[Setting]) -> list[str]:
    """`ranking`: each rank at its best rate. Ranks are compared where all else is as in the best setting; ranks that have
    no loss for some seed at any rate are named."""
    alike = [
        one
        for one in ranking
        if one.mode == best.mode and RANK in one.values and one.without(RANK, RATE) == best.without(RANK, RATE)
    ]
    alike.sort(key=lambda one: one.values[RANK])
    unsound = [str(one.values[RANK]) for one in alike if not one.sound]
    if unsound:
        said = f"At rank {', '.join(unsound)} some seed diverged or has no loss at every rate, so it is left out here."
        return [said, *_smallest_rank(best, [one for one in alike if one.sound])]
    deviation = pooled_deviation(alike)
    if len(alike) < 2:
        return []
    rank = best.values[RANK]
    with_rest = f" (with {show_values(best.without(RANK, RATE))})" if best.without(RANK, RATE) else ""
    if alike[0] is best:
        return [f"The smallest of these ranks, {rank}, is also the best{with_rest}."]
    if deviation is None:
        return ["Which rank is enough cannot be told from one seed."]
    of = f"one standard deviation ({show_loss(deviation)}, pooled over the ranks at their best rates)"
    small = next(one for one in alike if one is best or one.mean - best.mean <= deviation)
    if small is not best:
        return [
            f"The smallest rank that is enough is {small.values[RANK]}{with_rest}: {show_mean(small)}, within {of} of rank {rank}."
        ]
    larger = "; it is the largest tried: extend the grid" if alike[-1] is best else ""
    return [f"No smaller rank comes within {of} of rank {rank}{with_rest}{larger}."]


def _best_rate(best: list[Setting], groups: list[list[Setting]]) -> list[str]:
    rate, at = best[0].values.get(RATE), edge(best)
    if rate is None or len(values_of(RATE, best)) < 2:
        return []
    if at:
        said = [f"With {show_value(RATE, rate)} the best rate is the {at} tried: extend the grid."]
    else:
        tried = [show_value(RATE, one) for one in values_of(RATE, best)]
        said = [f"The best rate, {show_value(RATE, rate)}, lies inside the grid of {tried[0]} to {tried[-1]}."]
    rates = [show_value(RATE, one) for one in values_of(RATE, [group[0] for group in groups if group[0].sound])]
    if len(rates) > 1:
        said.append(f"Over all that was swept, best rates go from {rates[0]} to {rates[-1]}.")
    others = [group[0] for group in groups if edge(group) and group is not best]
    if others:
        named = "; ".join(show_setting(one, RATE) for one in others) if len(others) < 5 else f"{len(others)} other rows"
        said.append(f"The best rate of {named} is at the edge of those tried{' too' * bool(at)}.")
    return said


def _beside_baseline(best: Setting, groups: list[list[Setting]]) -> list[str]:
    sound = [group for group in groups if group[0].sound]
    if not sound:
        return ["In every setting of the full fine-tuning baseline a seed diverged."] if groups else []
    group = min(sound, key=lambda group: group[0].mean)
    baseline, at = group[0], edge(group)
    difference = baseline.mean - best.mean
    how_far = f"{show_loss(abs(difference))} {'above' if difference >= 0 else 'below'} the best adapter"
    if baseline.deviation and best.deviation:
        deviation = pooled_deviation([baseline, best])
        how_far += f", which is {abs(difference) / deviation:.1f} times their pooled standard deviation"
    named = f" ({show_values(baseline.values)})" if baseline.values else ""
    said = f"The full fine-tuning baseline{named} comes to {show_mean(baseline)}, {how_far}"
    return [f"{said}; its best rate is the {at} tried: extend the grid." if at else f"{said}."]


# ---- Tables ----------------------------------------------------------------------------------------------------------


def _settings_table(results: list[Result], settings: list[Setting]) -> str:
    keys = [key for key in swept_keys(results) if key != SEED]
    with_mode = any(result.mode == "full" for result in results)
    head = ["", *map(show_key, keys), *[MODE] * with_mode, *_head(results)]
    rows = [
        [str(place), *_values(one.values, keys), *[one.mode] * with_mode, *_numbers(results, one)]
        for place, one in enumerate(settings, start=1)
    ]
    return _table(head, rows)


def _best_rates_table(results: list[Result], settings: list[Setting]) -> str:
    keys = [key for key in swept_keys(results) if key not in (SEED, RATE)]
    with_mode = any(result.mode == "full" for result in results)
    groups = best_rates(settings)
    with_edge = any(edge(group) for group in groups)
    head = [*map(show_key, keys), *[MODE] * with_mode, "best rate", *["at the edge"] * with_edge, *_head(results)]
    rows = []
    for group in groups:
        best, at = group[0], edge(group)
        row = [*_values(best.values, keys), *[best.mode] * with_mode]
        row += [show_value(RATE, best.values[RATE]) if best.sound and RATE in best.values else NOTHING]
        row += [f"{at} tried" if at else ""] * with_edge
        rows.append([*row, *_numbers(results, best)])
    return _table(head, rows)


def _head(results: list[Result]) -> list[str]:
    return [loss_name(results), "seeds", *["perplexity"] * held_out(results), "trainable parameters", "bytes"]


def _numbers(results: list[Result], setting: Setting) -> list[str]:
    seeds = f"{len(setting.losses)}"
    if len(setting.losses) < len(setting.members):
        seeds += f" of {len(setting.members)}"
    one = setting.members[0]
    return [
        "diverged" if setting.diverged == len(setting.members) else show_mean(setting),
        seeds,
        *[show_perplexity(setting.mean)] * held_out(results),
        f"{one.trainable:,}",
        format_bytes(one.adapter_bytes),
    ]


def _diverged(results: list[Result], settings: list[Setting]) -> str:
    lines = [
        f"- `{member.name}` at step {member.diverged:,}"
        for member in rank_members(results)
        if member.diverged is not None
    ]
    some = [
        f"{show_setting(one)}: {one.diverged} of {len(one.members)} seeds"
        for one in settings
        if 0 < one.diverged < len(one.members)
    ]
    if some:
        lines += [
            "",
            f"Settings with a mean of the other seeds only, ranked below all without divergence: {'; '.join(some)}.",
        ]
    return "\n".join(lines)


def _members_table(results: list[Result]) -> str:
    keys, by_held_out = swept_keys(results), held_out(results)
    with_mode = any(result.mode == "full" for result in results)
    with_matches = any(result.exact_match is not None for result in results)
    head = ["", "member", *map(show_key, keys), *[MODE] * with_mode]
    head += ["held-out loss", "perplexity", "best", "at step"] if by_held_out else []
    head += ["training loss", *["exact match"] * with_matches, "steps"]
    rows = []
    for place, member in enumerate(rank_members(results), start=1):
        row = [str(place), f"`{member.name}`", *_values(member.swept, keys), *[member.mode] * with_mode]
        if by_held_out:
            row += [show_loss(member.loss), show_perplexity(member.loss), show_loss(member.best_loss)]
            row += [NOTHING if member.best_step is None else f"{member.best_step:,}"]
        row += [show_loss(member.train_loss)]
        row += [NOTHING if member.exact_match is None else f"{member.exact_match:.3f}"] * with_matches
        row += [f"{member.steps:,}" + (" (diverged)" if member.diverged is not None else "")]
        rows.append(row)
    return _table(head, rows)


def _values(values: dict[str, object], keys: list[str]) -> list[str]:
    return [show_value(key, values[key]) if key in values else NOTHING for key in keys]


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown that is a table as plain text, too: columns padded, those of numbers to the right."""
    columns = [[cell.replace("|", r"\|") for cell in column] for column in zip(head, *rows, strict=True)]
    for i, (name, *cells) in enumerate(columns):
        width = max(3, *map(len, (name, *cells)))
        # Losses keep to the left: with and without a deviation, their points then stand below each other.
        right = all(cell[:1].isdigit() or cell == NOTHING for cell in cells) and not any("±" in cell for cell in cells)
        rule = "-" * (width - 1) + ":" if right else "-" * width
        columns[i] = [cell.rjust(width) if right else cell.ljust(width) for cell in (name, *cells)]
        columns[i].insert(1, rule)
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
