"""What came of a sweep's members, and who did best: the numbers behind its tables and its picture.

Members that differ in nothing but the seed are one setting. Settings are compared by their mean over seeds; one in
which a seed diverged never stands above one in which none did.
"""

import dataclasses
import math
import statistics

RANK, RATE, SEED, TARGETS, MODE = "lora.rank", "optim.learning_rate", "seed", "lora.targets", "train.mode"


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one member."""

    name: str  # of its workdir, under members/
    swept: dict[str, object]  # config key -> this member's value, in the order of the grid
    mode: str  # "lora", or "full": the baseline, whose `swept` lacks the keys that mean nothing for it
    trainable: int  # parameters, padding not counted
    adapter_bytes: int  # of what is trained, in float32
    steps: int  # finished
    train_loss: float | None  # of the last logged step
    curve: tuple[tuple[int, float], ...]  # (step, eval/loss); empty if nothing is held out
    diverged: int | None = None  # the step whose loss was not finite: the member was frozen before it
    exact_match: float | None = None

    @property
    def loss(self) -> float | None:
        """Held out, at the end."""
        return self.curve[-1][1] if self.curve and self.diverged is None else None

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else perplexity(self.loss)

    @property
    def best_step(self) -> int | None:
        return min(self.finite_curve, key=lambda point: point[1])[0] if self.finite_curve else None

    @property
    def best_loss(self) -> float | None:
        return min(loss for _, loss in self.finite_curve) if self.finite_curve else None

    @property
    def finite_curve(self) -> list[tuple[int, float]]:
        """An evaluation may overflow where the training loss was still finite."""
        return [point for point in self.curve if math.isfinite(point[1])]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Members that differ in nothing but the seed, and the losses of those that have one: what diverged has none."""

    values: dict[str, object]  # the swept keys but the seed
    mode: str
    members: tuple[Result, ...]
    losses: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.losses) if self.losses else None

    @property
    def deviation(self) -> float | None:
        """The sample's; of one seed there is none."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def diverged(self) -> int:
        return sum(member.diverged is not None for member in self.members)

    @property
    def sound(self) -> bool:
        """Its mean is that of all its seeds: fewer would flatter it."""
        return len(self.losses) == len(self.members)

    def without(self, *keys: str) -> dict[str, object]:
        return {key: value for key, value in self.values.items() if key not in keys}


# ---- Grouping and ranking --------------------------------------------------------------------------------------------


def held_out(results: list[Result]) -> bool:
    return any(result.curve for result in results)


def loss_name(results: list[Result]) -> str:
    return "held-out loss" if held_out(results) else "training loss"


def rank_members(results: list[Result]) -> list[Result]:
    """By the held-out loss, or the training loss where nothing is held out; last the diverged ones, the latest first."""
    by_held_out = held_out(results)

    def place(result: Result):
        loss = loss_of(result, by_held_out)
        return (result.diverged is not None, -(result.diverged or 0), math.inf if loss is None else loss)

    return sorted(results, key=place)


def rank_settings(results: list[Result]) -> list[Setting]:
    """By the share of seeds that have no loss (most of them diverged), then by the mean loss of the others."""
    by_held_out = held_out(results)
    groups: list[tuple[tuple, list[Result]]] = []  # compared, not hashed: a value may be a list
    for result in results:
        of = (result.mode, {key: value for key, value in result.swept.items() if key not in (SEED, MODE)})
        found = next((members for other, members in groups if other == of), None)
        if found is None:
            groups.append((of, [result]))
        else:
            found.append(result)
    settings = []
    for (mode, values), members in groups:
        losses = [loss_of(member, by_held_out) for member in members]
        settings.append(Setting(values, mode, tuple(members), tuple(loss for loss in losses if loss is not None)))
    return sorted(
        settings, key=lambda one: (-len(one.losses) / len(one.members), math.inf if one.mean is None else one.mean)
    )


def loss_of(result: Result, by_held_out: bool) -> float | None:
    """What it is ranked by. A model whose evaluation overflows has no loss."""
    loss = result.loss if by_held_out else result.train_loss
    return loss if result.diverged is None and loss is not None and math.isfinite(loss) else None


def adapted_and_baseline(settings: list[Setting]) -> tuple[list[Setting], list[Setting]]:
    """Full fine-tuning is the baseline of adapters; where a sweep has no adapters it is what is swept."""
    baseline = [setting for setting in settings if setting.mode == "full"]
    adapted = [setting for setting in settings if setting.mode != "full"]
    return (adapted, baseline) if adapted else (baseline, [])


def swept_keys(results: list[Result]) -> list[str]:
    """In the order of the grid. The mode has a field of its own."""
    return list(dict.fromkeys(key for result in results for key in result.swept if key != MODE))


def values_of(key: str, settings: list[Setting]) -> list:
    """Those tried: numbers from small to large, tuples from short to long."""
    values = []
    for setting in settings:
        if key in setting.values and setting.values[key] not in values:
            values.append(setting.values[key])
    if all(is_number(value) for value in values):
        return sorted(values)
    return sorted(values, key=lambda value: (len(value) if isinstance(value, (tuple, list)) else 0, str(value)))


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def by_values(settings: list[Setting], keys: list[str]) -> list[list[Setting]]:
    """Settings that agree in `keys` together, ranked as they were; groups in the order of the keys' values."""
    order = [values_of(key, settings) for key in keys]

    def place(setting: Setting) -> tuple:
        return tuple(
            values.index(setting.values[key]) if key in setting.values else -1
            for key, values in zip(keys, order, strict=True)
        )

    groups: dict[tuple, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(place(setting), []).append(setting)
    return [groups[at] for at in sorted(groups)]


def pooled_deviation(settings: list[Setting]) -> float | None:
    """Of one seed beside another of the same setting, estimated from all of these settings together."""
    freedom = sum(len(one.losses) - 1 for one in settings if one.losses)
    if not freedom:
        return None
    return math.sqrt(sum((len(one.losses) - 1) * (one.deviation or 0) ** 2 for one in settings) / freedom)


def best_rates(settings: list[Setting]) -> list[list[Setting]]:
    """For each combination of the other keys its settings of all rates, the best first; the baseline's come last."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting.values if key != RATE))
    adapted, baseline = adapted_and_baseline(settings)
    return [*by_values(adapted, keys), *by_values(baseline, keys)]


def edge(group: list[Setting]) -> str | None:
    """Whether the best rate of a group is the "smallest" or the "largest" of several that were tried."""
    rates = values_of(RATE, group)
    if len(rates) < 2 or not group[0].sound:
        return None
    return {rates[0]: "smallest", rates[-1]: "largest"}.get(group[0].values[RATE])


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
