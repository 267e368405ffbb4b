"""The loss of a base, with or without an adapter, on every example of a file, and confidence intervals for its mean.

The loss is the mean over predicted tokens, as in training. Intervals treat examples, not tokens, as independent draws. Two
adapters are compared example by example, which resolves far smaller differences than their two intervals.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lowrank.config import Config, DataConfig
from lowrank.data import loader
from lowrank.data.batch import to_devices
from lowrank.data.examples import Examples, encode_examples, one_format
from lowrank.data.records import read_records
from lowrank.errors import UserError
from lowrank.files import lines, paths
from lowrank.inference.model import Model, load
from lowrank.parallel import mesh as mesh_lib
from lowrank.runs import workdir
from lowrank.runs.adapter import Adapter, read_adapter, refuse_step_of_none
from lowrank.runs.console import counting
from lowrank.training.step import make_losses_step
from lowrank.weights.base import read_base

Z = 1.959964  # the normal distribution's 97.5 % quantile: two-sided intervals of 95 %


class Estimate(NamedTuple):
    """A loss in nats per token; `mean` ± `margin` is its 95 % confidence interval, which one example does not have."""

    mean: float
    margin: float | None


class Evaluation(NamedTuple):
    """The loss of each example under one model, or under two that are compared."""

    settings: DataConfig  # how the examples were made
    examples: Examples
    records: np.ndarray  # int32 [records], which of the data's; a long text or a chat may be several examples
    tokens: np.ndarray  # float64 [records], predicted tokens
    losses: np.ndarray  # float64 [models, records], in nats, summed over the record's predicted tokens

    @property
    def loss(self) -> Estimate:
        return estimate_mean(self.losses[0], self.tokens)

    @property
    def other_loss(self) -> Estimate:
        return estimate_mean(self.losses[1], self.tokens)

    @property
    def difference(self) -> Estimate:
        """The first model's loss minus the second's, paired by example."""
        return estimate_mean(self.losses[0] - self.losses[1], self.tokens)


def evaluate(
    base,
    data,
    adapter=None,
    other=None,
    *,
    step: int | str | None = None,
    config: Config | None = None,
    format: str | None = None,
    max_length: int | None = None,
    train_on_prompt: bool | None = None,
    packing: bool = True,
    batch_size: int = 16,
    dtype: str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a base with `adapter` (None: alone) on the file `data`; with `other`, a second adapter on the same examples.

    Examples are made as `format`, `max_length` and `train_on_prompt` say, else as `config` does, else as the adapters' runs
    did. `config` also gives the mesh. `packing` and `batch_size` (rows computed at once) change the speed only. `base`, the
    adapters, `step` (of `adapter`) and `dtype` are those of `lowrank.load`. `progress`: show on stderr how many examples are
    done. Raises UserError.
    """
    mesh = mesh_lib.make_mesh(config.mesh if config else mesh_lib.MeshConfig())
    source = read_base(base)
    names = (adapter, other) if other else (adapter,)
    refuse_step_of_none(step, adapter)
    adapters = [read_adapter(name, at, source) if name else None for name, at in zip(names, (step, None), strict=False)]
    given = {"format": format, "max_length": max_length, "train_on_prompt": train_on_prompt}
    settings = _choose_settings(config, adapters, {name: value for name, value in given.items() if value is not None})
    if settings.max_length > source.config.max_length:
        raise UserError(
            f"max_length={settings.max_length} is more than the model reads ({source.config.max_length}); "
            f"give {source.config.max_length} or less"
        )
    records = read_records(data, settings.format, dict(settings.columns), settings.system)
    settings = dataclasses.replace(settings, format=one_format(records, data))
    losses, fingerprints = [], set()
    for opened in adapters:
        model = load(source, opened, dtype=dtype, mesh=mesh)
        options = (settings.max_length, settings.train_on_prompt, data, settings.overflow)
        examples = encode_examples(records, settings.format, model.tokenizer, *options)
        fingerprints.add(loader.fingerprint(examples))
        if len(fingerprints) > 1:
            raise UserError("the two adapters have different tokenizers, so their losses cannot be compared")
        shape = {"batch_size": batch_size, "max_length": settings.max_length, "packing": packing}
        with counting("examples", len(examples.examples)) if progress else contextlib.nullcontext() as show:
            losses.append(_example_losses(model, examples, mesh, show, **shape))
        del model  # one at a time
    sums = np.stack(losses)
    columns = examples.examples
    records = np.unique(columns.record)
    wrong = records[~np.isfinite(sums).all(axis=0)].tolist()
    if wrong:
        raise UserError(f"the loss of records {', '.join(map(str, wrong))} of {data} is not finite; look at them")
    tokens = np.bincount(np.searchsorted(records, columns.record), columns.targets)
    return Evaluation(settings, examples, records, tokens, sums)


def _choose_settings(config: Config | None, adapters: list[Adapter | None], given: dict) -> DataConfig:
    """`given` over those of the config, else over those of the adapters' runs, which have to agree."""
    if config:
        return dataclasses.replace(config.data, **given)
    runs = [workdir.read_config(adapter.folder).data for adapter in adapters if adapter and adapter.step is not None]
    found = [dataclasses.replace(settings, **given) for settings in runs or [DataConfig()]]
    values = {name: [getattr(each, name) for each in found] for name in ("format", "max_length", "train_on_prompt")}
    differing = [f"{name} is {' and '.join(map(str, each))}" for name, each in values.items() if each[0] != each[-1]]
    if differing:
        raise UserError(f"the two runs made examples in different ways: {', '.join(differing)}; give these settings")
    return found[0]


def _example_losses(
    model: Model, examples: Examples, mesh: Mesh, show: Callable[[float], None] | None, *, batch_size: int, **shape
) -> np.ndarray:
    """float64 [records]: the summed loss of each record's predicted tokens."""
    shards = mesh_lib.batch_shards(mesh)
    step, rows = make_losses_step(model.model), -(-batch_size // shards) * shards  # every device gets as many
    records = np.unique(examples.examples.record)
    sums, done = np.zeros(len(records)), 0
    for batch, indices in loader.evaluation_batches(examples, batch_size=rows, **shape):
        with jax.set_mesh(mesh):
            losses = np.asarray(step(model.variables, to_devices(batch, mesh)), np.float64)
        np.add.at(sums, np.searchsorted(records, indices[batch.loss_mask]), losses[batch.loss_mask])
        done += int(batch.segment_ids.max(axis=1).sum())
        if show:
            show(done)
    return sums


def estimate_mean(sums: np.ndarray, tokens: np.ndarray) -> Estimate:
    """Loss sums and token counts of examples, float64 [examples] -> the mean over tokens and its 95 % margin.

    The mean is a ratio of two sums over examples; its variance is that of the ratio's linear part (Cochran, Sampling
    Techniques, 1977, section 6.3).
    """
    mean, count = sums.sum() / tokens.sum(), len(sums)
    if count < 2:
        return Estimate(float(mean), None)
    variance = count / (count - 1) * np.sum((sums - mean * tokens) ** 2) / tokens.sum() ** 2
    return Estimate(float(mean), Z * math.sqrt(variance))


def write_losses(file: paths.Path, evaluation: Evaluation) -> None:
    """Write a JSON line for each record: its index in the data, its predicted tokens, its mean loss under each model."""
    written = ""
    columns = (evaluation.records.tolist(), evaluation.tokens, evaluation.losses.T)
    for record, tokens, losses in zip(*columns, strict=True):
        means = dict(zip(("loss", "other_loss"), (losses / tokens).tolist(), strict=False))
        written += json.dumps({"example": record, "tokens": int(tokens)} | means) + "\n"
    lines.replace(file, written)
