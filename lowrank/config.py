"""The typed config: frozen dataclasses that check every value, filled from nested dicts (config_file.py reads those).

A config file is a Python file with `get_config()` that returns an `ml_collections.ConfigDict`; what it leaves out has
the defaults below. `--config.lora.rank=16` overrides any key, whether the file spells it out or not.
"""

import ast
import dataclasses
import difflib
import functools
import math
import types
import typing

from lowrank.adapters.lora import TARGETS, LoraConfig
from lowrank.errors import UserError
from lowrank.files.nested import set_path
from lowrank.model.decoder import REMAT
from lowrank.model.kernels import AUTO, BACKENDS
from lowrank.parallel.mesh import MeshConfig
from lowrank.training.optimizer import SCHEDULES, OptimConfig

FORMATS = ("alpaca", "chat", "completion", "text")
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learnt from. `max_length` counts inputs; `eval_examples` are taken off the end of `train`."""

    train: str | None = None
    eval: str | None = None
    eval_examples: int = 0
    format: str = "alpaca"
    max_length: int = 512
    packing: bool = True
    shuffle: bool = True
    seed: int | None = None
    train_on_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long: `steps`, or `epochs` where no steps are given; `batch_size` is rows a step over all devices."""

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    microbatches: int = 1
    mode: str = "lora"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """`every` steps (and at the end); `answers`: so many evaluation examples are also answered, and counted if equal."""

    every: int = 0
    answers: int = 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Saved `every` steps and at the end; the `keep` newest stay, and the best by evaluation loss."""

    every: int = 0
    keep: int = 3


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """A line of metrics `every` steps; `tensorboard` and `wandb` (a project's name) write them there too."""

    every: int = 10
    tensorboard: bool = False
    wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What the model says to `prompts`, `every` steps (and before the first one and at the end)."""

    every: int = 0
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. `architecture` names the model that `base` must be; without a base, one to plan, or to train from scratch."""

    base: str | None = None
    architecture: str | None = None
    tokenizer: str | None = None
    init_adapter: str | None = None
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"
    remat: str = "none"
    attention: str = "auto"
    seed: int = 0

    @property
    def adapter(self) -> LoraConfig | None:
        """The adapter to put on the model: none in full fine-tuning."""
        return self.lora if self.train.mode == "lora" else None


def checked(values: dict) -> Config:
    """Nested dicts -> the config, with defaults for what they leave out. Raises UserError with all offenders."""
    errors: list[str] = []
    config = build(Config, values, "", errors)
    errors = errors or _check(config)
    if errors:
        raise UserError("; ".join(errors))
    return config


class Text(str):
    """A value from the command line: its type is still to be read from the key's."""


def build(cls, values: dict, prefix: str, errors: list[str]):
    """A dataclass from a dict, its nested ones too; every unknown key and every value of the wrong type is listed."""
    hints = typing.get_type_hints(cls)
    fields = {}
    for key, value in values.items():
        name = f"config.{prefix}{key}"
        if key not in hints:
            unknown = _leaf_keys(value, prefix + key)
            errors += [f"config.{leaf} is no config key{did_you_mean(leaf)}" for leaf in unknown]
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, dict):
                fields[key] = build(hints[key], value, f"{prefix}{key}.", errors)
            else:
                errors.append(f"{name} holds keys, not a value: write {name}.KEY=VALUE")
        else:
            try:
                fields[key] = _convert(value, hints[key], commas=key != "prompts")  # a prompt may hold a comma
            except ValueError as error:
                errors.append(f"{name}={value!s} is not {error}")
    return cls(**fields)


def _convert(value, hint, commas: bool):
    """`value` as the annotated type, or a ValueError that says what it should be. `commas` part the strings of a tuple."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in options and (value is None or (isinstance(value, Text) and value in ("None", "none", ""))):
        return None
    (kind,) = [option for option in options if option is not types.NoneType]
    if kind is str:
        if isinstance(value, str):
            return str(value)
        raise ValueError("a string")
    if kind in PER_TARGET:
        return _per_target(literal(value) if isinstance(value, Text) else value, *PER_TARGET[kind])
    if typing.get_origin(kind) is tuple:
        if isinstance(value, Text):
            value = literal(value) if value.strip().startswith(("(", "[")) else value
        if isinstance(value, str):
            value = tuple(part.strip() for part in value.split(",") if part) if commas else (str(value),) * bool(value)
        if isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ValueError("a list of strings such as ('q_proj','v_proj')")
    if isinstance(value, Text):
        value = {"true": True, "false": False}.get(value.lower()) if kind is bool else literal(value)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is kind and kind is not float:
        return value
    raise ValueError({int: "a whole number", float: "a number", bool: "True or False"}[kind])


# Of `lora.ranks` and `lora.alphas`: the annotation -> the type of a value, and what an error asks for.
PER_TARGET = {
    tuple[tuple[str, tuple[int, ...]], ...]: (
        int,
        "ranks of targets such as {'down_proj': 32, 'q_proj': (8, 8, 4, 0)}",
    ),
    tuple[tuple[str, tuple[float, ...]], ...]: (float, "alphas of targets such as {'down_proj': 64.0}"),
}


def _per_target(value, kind: type, wanted: str):
    """A table from targets to one value, or to one for each layer, as pairs of tuples in the order of TARGETS."""
    try:
        table = {target: literal(one) if isinstance(one, Text) else one for target, one in dict(value).items()}
        table = {target: one if isinstance(one, (tuple, list)) else (one,) for target, one in table.items()}
        table = {target: tuple(_convert(one, kind, commas=False) for one in values) for target, values in table.items()}
    except (TypeError, ValueError):
        raise ValueError(wanted) from None
    if not all(isinstance(target, str) for target in table):
        raise ValueError(wanted)
    order = {target: i for i, target in enumerate(TARGETS)}
    return tuple(sorted(table.items(), key=lambda entry: order.get(entry[0], len(order))))


def literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _leaf_keys(value, key: str) -> list[str]:
    """The keys of what nested dicts hold; `key` itself is that of the whole."""
    if not isinstance(value, dict) or not value:
        return [key]
    return [leaf for name, part in value.items() for leaf in _leaf_keys(part, f"{key}.{name}")]


def all_keys(cls=Config, prefix="") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        keys += all_keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return keys


def did_you_mean(key: str, root: str = "config.") -> str:
    """By the whole key, or by its last part under another parent (`config.rank` for `config.lora.rank`)."""
    keys = all_keys()
    same_leaf = [other for other in keys if other.split(".")[-1] == key.split(".")[-1]]
    close = same_leaf or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not close:
        by_leaf = {other.split(".")[-1]: other for other in keys}
        close = [by_leaf[leaf] for leaf in difflib.get_close_matches(key.split(".")[-1], by_leaf, n=1, cutoff=0.6)]
    return f"; did you mean {' or '.join(f'{root}{other}' for other in close)}?" if close else ""


def set_key(values: dict, key: str, value: typing.Any):
    """Set a key such as "lora.rank" in nested dicts of config values, not checked yet."""
    try:
        set_path(values, key.split("."), value)
    except ValueError as error:
        raise UserError(f"config.{key} is no key: config.{error}") from None


def value(config: Config, key: str):
    """The value under a key such as "lora.rank"."""
    return functools.reduce(getattr, key.split("."), config)


def _check(c: Config) -> list[str]:
    """All that is wrong with the values themselves, as lines; what needs the base or the data is checked with them."""
    errors = []
    get = functools.partial(value, c)

    def must(ok: bool, key: str, should: str):
        if not ok:
            errors.append(f"config.{key}={get(key)!s} must be {should}")

    def one_of(key: str, choices):
        close = difflib.get_close_matches(get(key), choices, n=1)
        must(
            get(key) in choices, key, f"one of {', '.join(choices)}" + (f" (did you mean {close[0]}?)" if close else "")
        )

    one_of("data.format", FORMATS)
    one_of("lora.scaling", ("standard", "rslora"))
    one_of("train.mode", ("lora", "full"))
    one_of("optim.schedule", SCHEDULES)
    one_of("dtype", DTYPES)
    one_of("param_dtype", DTYPES)
    one_of("remat", REMAT)
    one_of("attention", (AUTO, *BACKENDS))
    unknown = [target for target in c.lora.targets if target not in TARGETS]
    must(not unknown, "lora.targets", f"a choice of {', '.join(TARGETS)} ({', '.join(unknown)} matches nothing)")
    must(len(c.lora.targets) > 0, "lora.targets", "at least one target")
    for key in ("lora.ranks", "lora.alphas"):
        table = dict(get(key))
        stray = [target for target in table if target not in c.lora.targets]
        if stray:
            close = difflib.get_close_matches(stray[0], c.lora.targets, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            errors.append(
                f"config.{key} names {', '.join(stray)}, which config.lora.targets does not{meant}; leave it out"
            )
        values = [one for several in table.values() for one in several or (-1,)]
        if key == "lora.ranks":
            must(all(one >= 0 for one in values), key, "made of ranks of 0 (no adapter there) or more")
        else:
            must(all(one > 0 for one in values), key, "made of alphas above 0")
    idle = [target for target, values in c.lora.ranks if values and not any(values)]
    must(not idle, "lora.ranks", f"more than 0 somewhere ({', '.join(idle)}: leave it out of lora.targets)")
    must(len(set(c.lora.targets)) == len(c.lora.targets), "lora.targets", "without repetition")
    for key in ("lora.rank", "train.batch_size", "train.microbatches", "checkpoint.keep", "sample.max_new_tokens"):
        must(get(key) >= 1, key, "at least 1")
    for key in ("data.eval_examples", "optim.warmup_steps", "optim.weight_decay"):
        must(get(key) >= 0, key, "0 or more")
    must(0 <= c.seed < 2**32, "seed", "from 0 to 4294967295")
    must(c.data.seed is None or 0 <= c.data.seed < 2**32, "data.seed", "from 0 to 4294967295")
    for key in ("eval.every", "eval.answers", "checkpoint.every", "log.every", "sample.every", "optim.clip_norm"):
        must(get(key) >= 0, key, "0 (off) or more")
    must(c.lora.alpha > 0, "lora.alpha", "more than 0")
    must(0 <= c.lora.dropout < 1, "lora.dropout", "from 0 up to, not including, 1")
    must(0 <= c.optim.b1 < 1, "optim.b1", "from 0 up to, not including, 1")
    must(0 <= c.optim.b2 < 1, "optim.b2", "from 0 up to, not including, 1")
    must(c.optim.eps > 0, "optim.eps", "more than 0")
    must(c.data.max_length >= 2, "data.max_length", "at least 2 (a BOS and a token)")
    for key in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
        must(get(key) == -1 or get(key) >= 1, key, "-1 (the rest) or at least 1")
    if [c.mesh.data, c.mesh.fsdp, c.mesh.tensor].count(-1) > 1:
        errors.append("only one of config.mesh.data, config.mesh.fsdp and config.mesh.tensor can be -1 (the rest)")
    must(c.train.steps is None or c.train.steps >= 1, "train.steps", "at least 1")
    must(c.train.epochs is None or c.train.epochs > 0, "train.epochs", "more than 0")
    if c.train.steps is None and c.train.epochs is None:
        errors.append("config.train.steps or config.train.epochs must be set")
    must(
        c.train.batch_size % c.train.microbatches == 0,
        "train.batch_size",
        f"divisible by microbatches={c.train.microbatches}",
    )
    must(c.optim.learning_rate > 0, "optim.learning_rate", "more than 0")
    must(not (c.init_adapter and c.train.mode == "full"), "init_adapter", "None where train.mode is 'full'")
    must(not c.sample.every or c.sample.prompts, "sample.prompts", "at least one where sample.every is set")
    must(not (c.data.eval and c.data.eval_examples), "data.eval_examples", "0 where config.data.eval names a file")
    return errors


def to_dict(config: Config) -> dict:
    """As plain JSON-able values, for `config.json`."""
    return dataclasses.asdict(config)


def from_dict(values: dict) -> Config:
    """The inverse of `to_dict`, for a workdir's config."""
    errors: list[str] = []
    config = build(Config, values, "", errors)
    if errors:
        raise UserError("; ".join(errors))
    return config
