"""The results of a sweep's members, grouped into settings and ranked: the numbers behind its tables and its picture.

Members that differ only in the seed are one setting. Settings are compared by their mean over seeds; a setting in which
a seed diverged never ranks above one in which none did.
"""

import dataclasses
import math
import statistics
from typing import Any

RANK, RATE, SEED, TARGETS, MODE = "lora.rank", "optim.learning_rate", "seed", "lora.targets", "train.mode"


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one member. Losses are in nats per token."""

    name: str  # of its workdir, under members/
    swept: dict[str, Any]  # config key -> this member's value, in the order of the grid
    mode: str  # "lora", or "full": the baseline, whose `swept` lacks the keys that have no effect on it
    trainable: int  # parameters, without padding
    adapter_bytes: int  # of the trained parameters, in float32
    steps: int  # finished
    train_loss: float | None  # of the last logged step
    curve: tuple[tuple[int, float], ...]  # (step, eval/loss); empty if nothing is held out
    diverged: int | None = None  # the step whose loss was not finite: the member was frozen before it
    exact_match: float | None = None

    @property
    def loss(self) -> float | None:
        """The held-out loss at the end."""
        return self.curve[-1][1] if self.curve and self.diverged is None else None

    @property
    def score(self) -> float | None:
        """The loss that ranks the member: of training, if nothing is held out. None if it diverged or overflowed."""
        loss = self.loss if self.curve else self.train_loss
        return loss if self.diverged is None and loss is not None and math.isfinite(loss) else None

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else perplexity(self.loss)

    @property
    def best(self) -> tuple[int | None, float | None]:
        """The step and the held-out loss of the best evaluation."""
        return min(self.finite_curve, key=lambda point: point[1], default=(None, None))

    @property
    def finite_curve(self) -> list[tuple[int, float]]:
        """An evaluation may overflow where the training loss was still finite."""
        return [point for point in self.curve if math.isfinite(point[1])]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Members that differ only in the seed."""

    values: dict[str, Any]  # the swept keys without the seed
    mode: str
    members: tuple[Result, ...]

    @property
    def losses(self) -> tuple[float, ...]:
        """The scores of the members that have one."""
        return tuple(member.score for member in self.members if member.score is not None)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses) if self.losses else math.nan

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def diverged(self) -> int:
        return sum(member.diverged is not None for member in self.members)

    @property
    def complete(self) -> bool:
        """Every seed has a loss: a mean over fewer would flatter the setting."""
        return len(self.losses) == len(self.members)

    def without(self, *keys: str | None) -> dict[str, Any]:
        return {key: value for key, value in self.values.items() if key not in keys}


def has_held_out(results: list[Result]) -> bool:
    return any(result.curve for result in results)


def name_loss(results: list[Result]) -> str:
    return "held-out loss" if has_held_out(results) else "training loss"


def rank_members(results: list[Result]) -> list[Result]:
    """By their scores; diverged members last, the latest first."""

    def place(result: Result) -> tuple[bool, int, float]:
        return (
            result.diverged is not None,
            -(result.diverged or 0),
            math.inf if result.score is None else result.score,
        )

    return sorted(results, key=place)


def rank_settings(results: list[Result]) -> list[Setting]:
    """By the share of seeds without a loss (most of them diverged), then by the mean loss of the others."""
    groups: dict[tuple[str, tuple], list[Result]] = {}
    for result in results:
        values = tuple((key, value) for key, value in result.swept.items() if key not in (SEED, MODE))
        groups.setdefault((result.mode, values), []).append(result)
    settings = [Setting(dict(values), mode, tuple(members)) for (mode, values), members in groups.items()]
    return sorted(settings, key=lambda one: (-len(one.losses) / len(one.members), one.mean if one.losses else math.inf))


def split_baseline(settings: list[Setting]) -> tuple[list[Setting], list[Setting]]:
    """-> (adapters, the full fine-tuning baseline); in a sweep without adapters, full fine-tuning stands in their place."""
    baseline = [setting for setting in settings if setting.mode == "full"]
    adapted = [setting for setting in settings if setting.mode != "full"]
    return (adapted, baseline) if adapted else (baseline, [])


def list_keys(results: list[Result]) -> list[str]:
    """The swept keys in the order of the grid; the mode comes last, if any member is fine-tuned in full."""
    keys = dict.fromkeys(key for result in results for key in result.swept if key != MODE)
    return [*keys, *[MODE] * any(result.mode == "full" for result in results)]


def list_values(key: str, settings: list[Setting]) -> list[Any]:
    """The values tried: numbers from small to large, tuples from short to long."""
    values = dict.fromkeys(setting.values[key] for setting in settings if key in setting.values)
    if all(map(is_number, values)):
        return sorted(values)
    return sorted(values, key=lambda value: (len(value) if isinstance(value, tuple) else 0, str(value)))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def group_by(settings: list[Setting], keys: list[str]) -> list[list[Setting]]:
    """Settings with the same values of `keys`, each group ranked as `settings` is; groups in the order of the values."""
    order = {key: list_values(key, settings) for key in keys}
    groups: dict[tuple[int, ...], list[Setting]] = {}
    for setting in settings:
        place = tuple(order[key].index(setting.values[key]) if key in setting.values else -1 for key in keys)
        groups.setdefault(place, []).append(setting)
    return [groups[place] for place in sorted(groups)]


def group_rates(settings: list[Setting]) -> list[list[Setting]]:
    """The rates tried for each combination of the other keys, the best rate first; groups of the baseline come last."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting.values if key != RATE))
    adapted, baseline = split_baseline(settings)
    return [*group_by(adapted, keys), *group_by(baseline, keys)]


def pool_deviation(settings: list[Setting]) -> float | None:
    """The standard deviation between seeds of one setting, pooled over these settings; None if each has one seed."""
    seeded = [(len(one.losses) - 1, one.deviation) for one in settings if one.deviation is not None]
    return math.sqrt(sum(n * d**2 for n, d in seeded) / sum(n for n, _ in seeded)) if seeded else None


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
