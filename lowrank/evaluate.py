"""How well a base, with or without an adapter, predicts a file of examples: loss and perplexity, with an interval.

    python -m lowrank.evaluate --base=DIR --data=held_out.json
    python -m lowrank.evaluate --base=DIR --adapter=runs/alpaca --data=held_out.json --to=losses.jsonl
    python -m lowrank.evaluate --base=DIR --adapter=runs/r16 --other=runs/r4 --data=held_out.json

The loss is the mean over trained tokens, as in training. How examples are made (format, length, what is trained on) is
as the adapter's run had it, or as --config says, or the flags. Intervals hold over examples: an example, not a token, is
what is drawn anew. Two adapters are compared example by example, which tells far smaller differences apart.
"""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from lowrank.cli import config_file
from lowrank.cli import run as cli
from lowrank.config import FORMATS, DataConfig
from lowrank.data import loader
from lowrank.data.batch import BATCH_KEYS
from lowrank.data.examples import Examples, encode_examples
from lowrank.data.records import read_records
from lowrank.errors import UserError
from lowrank.files import lines as lines_lib
from lowrank.files import paths
from lowrank.inference import model as model_lib
from lowrank.parallel import mesh as mesh_lib
from lowrank.runs import workdir
from lowrank.runs.adapter import Adapter, read_adapter
from lowrank.training.step import make_losses_step

flags.DEFINE_string("base", None, "The base: a folder with a checkpoint.")
flags.DEFINE_string("adapter", None, "An adapter: the workdir of a run (its latest step), or a PEFT folder.")
flags.DEFINE_string("other", None, "A second adapter, to compare with --adapter (or, without it, with the bare base).")
flags.DEFINE_string("data", None, "The file of examples.")
flags.DEFINE_string("config", None, "FILE or FILE:ARGUMENT: take the data's settings and the mesh from this config.")
flags.DEFINE_string("to", None, "Write the loss of every example to this file, as JSON lines.")
flags.DEFINE_enum("format", None, FORMATS, "What a record is; default: as the adapter's run or --config has it.")
flags.DEFINE_integer("max_length", None, "Tokens of an example at most; default: likewise.", lower_bound=2)
flags.DEFINE_bool("train_on_prompt", None, "Count the prompt's tokens, too; default: likewise.")
flags.DEFINE_bool("packing", True, "Several examples to a row. Changes the speed only.")
flags.DEFINE_integer("batch_size", 16, "Rows computed at once. Changes the speed only.", lower_bound=1)
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Held and computed in; default: as the checkpoint says.")
FLAGS = flags.FLAGS

Z = 1.959964  # the normal distribution's 97.5 % quantile: two-sided intervals of 95 %
HEEDED = ("config.data.format", "config.data.max_length", "config.data.train_on_prompt", "config.mesh")
FEW = 30  # examples, below which that distribution makes an interval too narrow


def main(arguments: list[str]):
    if not FLAGS.config:
        cli.refuse_unknown(arguments)
    missing = [f"--{name}" for name in ("base", "data") if not getattr(FLAGS, name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing; see --help")
    if FLAGS.to and paths.local(FLAGS.to).exists():
        raise UserError(f"--to={FLAGS.to} exists; give a new name or remove it")
    if FLAGS.to and not pathlib.Path(FLAGS.to).parent.is_dir():
        raise UserError(f"--to={FLAGS.to}: its folder does not exist; make it first")
    idle = [argument for argument in arguments if not argument.lstrip("-").startswith(HEEDED)]
    if idle:
        raise UserError(f"{' '.join(idle)} would change nothing: of --config only {', '.join(HEEDED)} are looked at")
    asked_for = config_file.read(FLAGS.config, arguments) if FLAGS.config else None
    mesh = mesh_lib.make_mesh(asked_for.mesh if asked_for else mesh_lib.MeshConfig())

    names = [FLAGS.adapter, FLAGS.other] if FLAGS.other else [FLAGS.adapter]
    adapters = [read_adapter(name) if name else None for name in names]
    settings = data_settings(asked_for.data if asked_for else None, adapters)
    losses, made = [], []
    for adapter in adapters:
        model = model_lib.load(FLAGS.base, adapter, dtype=FLAGS.dtype, mesh=mesh)
        examples = read_examples(settings, model)
        made.append(loader.fingerprint(examples))
        if made[-1] != made[0]:
            raise UserError("the two adapters have other tokenizers, so their losses cannot be compared")
        if len(made) == 1:
            print(describe(examples, settings))
        losses.append(example_losses(model, examples, settings.max_length, mesh))
        del model  # one at a time

    tokens = np.array([example.loss_mask.sum() for example in examples.examples], np.float64)
    width = max(len(name or "base") for name in names)
    for name, loss in zip(names, losses, strict=True):
        mean, half = mean_and_interval(loss, tokens)
        within, around = "", ""
        if half is not None:
            within = f" ± {half:.6f}"
            around = f" ({perplexity(mean - half)} to {perplexity(mean + half)})"
        print(f"{name or 'base':<{width}}  loss {mean:.6f}{within}  perplexity {perplexity(mean)}{around}")
    if FLAGS.other:
        mean, half = mean_and_interval(losses[0] - losses[1], tokens)
        first = names[0] or "base"
        if half is None:
            print(f"{first} minus {names[1]}: loss {mean:+.6f}")
        else:
            better = f"{first if mean < 0 else names[1]} is better"
            verdict = "no difference can be told" if abs(mean) <= half else better
            print(f"{first} minus {names[1]}: loss {mean:+.6f} ± {half:.6f}, example by example: {verdict}")
    if len(tokens) == 1:
        print("note: there is no interval from one example")
    elif len(tokens) < FEW:
        print(f"note: intervals from {len(tokens)} examples are too narrow; {FEW} or more make them trustworthy")
    if FLAGS.to:
        write(pathlib.Path(FLAGS.to), examples, tokens, losses)
        print(f"losses of {len(tokens):,} examples in {FLAGS.to}")


def data_settings(asked_for: DataConfig | None, adapters: list[Adapter | None]) -> DataConfig:
    """How examples are made: as the flags say, else --config, else the runs of the adapters, which have to agree."""
    flagged = {name: getattr(FLAGS, name) for name in ("format", "max_length", "train_on_prompt")}
    flagged = {name: value for name, value in flagged.items() if value is not None}
    if asked_for:
        return dataclasses.replace(asked_for, **flagged)
    runs = [workdir.read_config(adapter.folder).data for adapter in adapters if adapter and adapter.step is not None]
    found = runs[0] if runs else DataConfig()
    for other in runs[1:]:
        differing = [
            f"{name} is {getattr(found, name)} and {getattr(other, name)}"
            for name in ("format", "max_length", "train_on_prompt")
            if name not in flagged and getattr(found, name) != getattr(other, name)
        ]
        if differing:
            raise UserError(
                f"the two runs made examples in different ways: {', '.join(differing)}; choose by these flags"
            )
    return dataclasses.replace(found, **flagged)


def read_examples(settings: DataConfig, model: model_lib.Model) -> Examples:
    if settings.max_length > model.model.config.max_length:
        raise UserError(
            f"--max_length={settings.max_length} is more than the model reads ({model.model.config.max_length}); "
            f"say --max_length={model.model.config.max_length} or less"
        )
    records = read_records(FLAGS.data, settings.format)
    return encode_examples(
        records, settings.format, model.tokenizer, settings.max_length, settings.train_on_prompt, path=FLAGS.data
    )


def describe(examples: Examples, settings: DataConfig) -> str:
    what = "all tokens" if settings.format == "text" or settings.train_on_prompt else "responses"
    return (
        f"format {settings.format}, {settings.max_length} tokens at most, {what} predicted (--format, --max_length and "
        f"--train_on_prompt change that)\n"
        f"{FLAGS.data}: {len(examples.examples):,} examples, {examples.trained_tokens:,} tokens to predict; "
        f"{examples.truncated:,} truncated, {examples.dropped:,} dropped with nothing to predict"
    )


def example_losses(model: model_lib.Model, examples: Examples, max_length: int, mesh) -> np.ndarray:
    """float64 [examples]: the summed loss of each example's trained tokens."""
    shards = mesh_lib.batch_shards(mesh)
    rows = -(-FLAGS.batch_size // shards) * shards  # every device gets as many
    step = make_losses_step(model.model, shards)
    layout = NamedSharding(mesh, mesh_lib.spec(("batch", "length")))
    place = {example.index: i for i, example in enumerate(examples.examples)}
    sums = np.zeros(len(place))
    for batch in loader.evaluation_batches(examples, batch_size=rows, max_length=max_length, packing=FLAGS.packing):
        with jax.set_mesh(mesh):
            arrays = jax.device_put({name: batch[name] for name in BATCH_KEYS}, layout)
            losses = np.asarray(step(model.variables, arrays), np.float64)
        trained = batch["loss_mask"]
        np.add.at(sums, [place[index] for index in batch["examples"][trained]], losses[trained])
    if not np.isfinite(sums).all():
        wrong = [example.index for example in examples.examples if not np.isfinite(sums[place[example.index]])]
        raise UserError(
            f"the loss of examples {', '.join(map(str, wrong))} of {FLAGS.data} is not finite; look at them"
        )
    return sums


def perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4f}" if loss < 30 else f"{math.exp(min(loss, 700)):.3g}"


def mean_and_interval(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float | None]:
    """Sums and token counts of examples -> (mean over tokens, half the width of its 95 % interval; None for one example).

    The mean is a ratio of two sums over examples; its variance is that of the ratio's linear part (Cochran, Sampling
    Techniques, 1977, section 6.3).
    """
    mean = sums.sum() / tokens.sum()
    count = len(sums)
    if count < 2:
        return float(mean), None
    deviation = sums - mean * tokens
    variance = count / (count - 1) * np.sum(deviation**2) / tokens.sum() ** 2
    return float(mean), Z * math.sqrt(variance)


def write(file: pathlib.Path, examples: Examples, tokens: np.ndarray, losses: list[np.ndarray]):
    """A line per example: its number in the file, its predicted tokens, its mean loss (and the other adapter's)."""
    lines = []
    for i, example in enumerate(examples.examples):
        means = {name: loss[i] / tokens[i] for name, loss in zip(("loss", "other_loss"), losses, strict=False)}
        lines.append(json.dumps({"example": example.index, "tokens": int(tokens[i])} | means) + "\n")
    lines_lib.replace(file, "".join(lines))


if __name__ == "__main__":
    cli.run(main)
