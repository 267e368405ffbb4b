"""The typed config of a run: frozen dataclasses, with each field's check beside the field.

From Python: `check(Config(base=..., data=DataConfig(...)))`, or `from_values(get_config())` of a config file. A config
file is a Python file with `get_config()` that returns an `ml_collections.ConfigDict`; keys it leaves out have the
defaults below. `--config.lora.rank=16` overrides any key, whether the file has it or not (cli/config_file.py).
"""

import ast
import dataclasses
import difflib
import math
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import ml_collections

from lowrank.adapters.config import TARGETS, LoraConfig
from lowrank.data.records import FORMATS, NAMES
from lowrank.errors import UserError, meant
from lowrank.families.config import ATTENTION, MLP
from lowrank.files.nested import set_path
from lowrank.parallel.config import MeshConfig
from lowrank.training.config import SCHEDULES, OptimConfig

DTYPES = ("bfloat16", "float32")  # that the base can be held and computed in
REMAT = ("none", "dots", "full")  # what the backward pass may recompute: nothing, all but products, each block

# ---- Checks ----------------------------------------------------------------------------------------------------------

Check = Callable[[Any], str | None]  # a value -> what it must be instead, or None where it is right


def must_be(what: str, holds: Callable[[Any], bool]) -> Check:
    """None, for "not given", passes every check: the field's type says whether it may be None."""
    return lambda value: None if value is None or holds(value) else what


def at_least(least: int, note: str = "") -> Check:
    return must_be(f"at least {least}{note}", lambda value: value >= least)


def one_of(choices: Sequence[str], notes: Mapping[str, str] = types.MappingProxyType({})) -> Check:
    """`notes`: what to say of some wrong values."""
    return lambda value: (
        None if value in choices else f"one of {', '.join(choices)}{notes.get(value) or meant(value, choices)}"
    )


POSITIVE = must_be("more than 0", lambda value: value > 0)
NOT_NEGATIVE = must_be("0 or more", lambda value: value >= 0)
OFF_OR_MORE = must_be("0 (off) or more", lambda value: value >= 0)
FRACTION = must_be("from 0 up to, not including, 1", lambda value: 0 <= value < 1)
SEED = must_be("from 0 to 4294967295", lambda value: 0 <= value < 2**32)
DEVICES = must_be("-1 (the rest) or at least 1", lambda value: value == -1 or value >= 1)


TARGET_SETS = {"all": TARGETS, "attention": ATTENTION, "mlp": MLP}  # names that `lora.targets` takes for several


def _check_targets(targets: tuple[str, ...]) -> str | None:
    if not targets:
        return f"at least one of {', '.join(TARGETS)}, or all, attention, mlp"
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        return f"a choice of {', '.join(TARGETS)}, or all, attention, mlp ({', '.join(unknown)} matches nothing)"
    return None if len(set(targets)) == len(targets) else "without repetition"


def _check_ranks(table: tuple[tuple[str, tuple[int, ...]], ...]) -> str | None:
    if not all(ranks and min(ranks) >= 0 for _, ranks in table):
        return "made of ranks of 0 (no adapter there) or more"
    idle = [target for target, ranks in table if not any(ranks)]
    return f"more than 0 somewhere ({', '.join(idle)}: leave it out of lora.targets)" if idle else None


def _check_columns(columns: tuple[tuple[str, str], ...]) -> str | None:
    unknown = [name for name, _ in columns if name not in NAMES]
    return f"names of {', '.join(NAMES)} ({', '.join(unknown)} is none){meant(unknown[0], NAMES)}" if unknown else None


FORMAT_NOTES = {
    **dict.fromkeys("sharegpt openai messages chatml conversation conversations".split(), " (did you mean chat?)"),
    **dict.fromkeys("json jsonl csv tsv parquet arrow".split(), " (kinds of files are recognized: say auto)"),
}


# ---- The config ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data: a file, folder, pattern or data set of the hub, or several. `max_length` counts inputs; `eval_examples` are taken
    off the end of `train`.

    `mixture`: how often the sources of `train` are drawn from. `cache`: the folder where tokens are kept.
    `columns`: what fields are called in the data. `system`: the system message of records without one. `overflow`: what
    becomes of a text beyond `max_length`.
    """

    train: str | tuple[str, ...] | None = None
    eval: str | tuple[str, ...] | None = None
    eval_examples: Annotated[int, NOT_NEGATIVE] = 0
    format: Annotated[str, one_of(("auto", *FORMATS), FORMAT_NOTES)] = "auto"
    columns: Annotated[tuple[tuple[str, str], ...], _check_columns] = ()
    system: str | None = None
    overflow: Annotated[str, one_of(("truncate", "chunk"))] = "truncate"
    mixture: Annotated[
        tuple[float, ...], must_be("made of weights above 0", lambda weights: min(weights, default=1) > 0)
    ] = ()
    cache: str | None = None  # None: beside the workdir, for data of 1 MB or more
    max_length: Annotated[int, at_least(2, " (a BOS and a token)")] = 512
    packing: bool = True
    shuffle: bool = True
    seed: Annotated[int | None, SEED] = None  # None: the config's own seed
    train_on_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`steps`, or `epochs` where `steps` is None; `batch_size` is rows per step over all devices."""

    steps: Annotated[int | None, at_least(1)] = None
    epochs: Annotated[float | None, POSITIVE] = None
    batch_size: Annotated[int, at_least(1)] = 16
    microbatches: Annotated[int, at_least(1)] = 1
    mode: Annotated[str, one_of(("lora", "full"))] = "lora"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluate `every` steps and at the end; the model also answers `answers` of the examples, and exact matches count."""

    every: Annotated[int, OFF_OR_MORE] = 0
    answers: Annotated[int, OFF_OR_MORE] = 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Save `every` steps and at the end; the `keep` newest checkpoints stay, and the best by evaluation loss."""

    every: Annotated[int, OFF_OR_MORE] = 0
    keep: Annotated[int, at_least(1)] = 3


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Write metrics `every` steps; also to `tensorboard`, and to `wandb` (a project's name)."""

    every: Annotated[int, OFF_OR_MORE] = 10
    tensorboard: bool = False
    wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Generate from `prompts` `every` steps, before the first one and at the end."""

    every: Annotated[int, OFF_OR_MORE] = 0
    prompts: tuple[str, ...] = ()
    max_new_tokens: Annotated[int, at_least(1)] = 128


LORA_CHECKS = {
    "rank": at_least(1),
    "alpha": POSITIVE,
    "dropout": FRACTION,
    "targets": _check_targets,
    "scaling": one_of(("standard", "rslora")),
    "init": one_of(("default", "a_zero")),
    "ranks": _check_ranks,
    "alphas": must_be("made of alphas above 0", lambda table: all(alphas and min(alphas) > 0 for _, alphas in table)),
}
OPTIM_CHECKS = {
    "learning_rate": POSITIVE,
    "schedule": one_of(SCHEDULES),
    "warmup_steps": NOT_NEGATIVE,
    "warmup_ratio": FRACTION,
    "weight_decay": NOT_NEGATIVE,
    "clip_norm": OFF_OR_MORE,
    "b1": FRACTION,
    "b2": FRACTION,
    "eps": POSITIVE,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. `architecture` names the model that `base` must be; without a base, the one to plan or to pretrain."""

    base: str | None = None
    architecture: str | None = None
    tokenizer: str | None = None
    init_adapter: str | None = None
    data: DataConfig = DataConfig()
    lora: Annotated[LoraConfig, LORA_CHECKS] = LoraConfig()
    train: TrainConfig = TrainConfig()
    optim: Annotated[OptimConfig, OPTIM_CHECKS] = OptimConfig()
    mesh: Annotated[MeshConfig, {"data": DEVICES, "fsdp": DEVICES, "tensor": DEVICES}] = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()
    dtype: Annotated[str, one_of(DTYPES)] = "bfloat16"
    param_dtype: Annotated[str, one_of(DTYPES)] = "bfloat16"
    remat: Annotated[str, one_of(REMAT)] = "none"
    attention: Annotated[str, one_of(("auto", "xla", "cudnn", "splash"))] = "auto"
    seed: Annotated[int, SEED] = 0

    @property
    def adapter(self) -> LoraConfig | None:
        """The adapter to put on the model: none in full fine-tuning."""
        return self.lora if self.train.mode == "lora" else None


def from_values(values: Mapping | ml_collections.ConfigDict) -> Config:
    """Nested values by key (a config file's ConfigDict, a workdir's JSON) -> the config. UserError lists all offenders."""
    values = plain(values)
    if values.pop("sweep", None):
        raise UserError("config.sweep is set, but this is one run: use python -m lowrank.sweep, or remove it")
    errors: list[str] = []
    config = build(Config, values, "", errors)
    targets = tuple(one for name in config.lora.targets for one in TARGET_SETS.get(name, (name,)))
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, targets=targets))
    errors = errors or [*wrong_values(config), *_contradictions(config)]
    if errors:
        raise UserError("; ".join(errors))
    return config


def check(config: Config) -> Config:
    """A config built in Python -> the same with every type and value checked. UserError lists all offenders."""
    return from_values(to_dict(config))


def to_dict(config: Config) -> dict:
    """Nested dicts of values that JSON can hold, for `config.json`; `from_values` is the inverse."""
    return dataclasses.asdict(config)


def plain(values: Mapping | ml_collections.ConfigDict) -> dict:
    """Nested dicts, with tuples as they are (`ConfigDict.to_dict` makes lists of a sweep's)."""
    nested = (Mapping, ml_collections.ConfigDict)
    return {key: plain(values[key]) if isinstance(values[key], nested) else values[key] for key in values}


def wrong_values(config: Any, prefix: str = "", checks: Mapping[str, Any] = types.MappingProxyType({})) -> list[str]:
    """Every field that fails its check, the nested ones too; `checks` are those of a dataclass without its own."""
    errors = []
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        own = getattr(config, name)
        check: Any = getattr(hint, "__metadata__", (checks.get(name),))[0]
        if dataclasses.is_dataclass(own):
            errors += wrong_values(own, f"{prefix}{name}.", check or {})
        elif check and (should := check(own)):
            errors.append(f"config.{prefix}{name}={own!s} must be {should}")
    return errors


def _contradictions(c: Config) -> list[str]:
    """Values that are right alone and not together. (What needs the base or the data is checked where those are read.)"""
    errors = []
    for key, table in (("lora.ranks", c.lora.ranks), ("lora.alphas", c.lora.alphas)):
        stray = [target for target, _ in table if target not in c.lora.targets]
        if stray:
            others = f"config.lora.targets does not{meant(stray[0], c.lora.targets)}"
            errors.append(f"config.{key} names {', '.join(stray)}, which {others}; leave it out")
    if [c.mesh.data, c.mesh.fsdp, c.mesh.tensor].count(-1) > 1:
        errors.append("only one of config.mesh.data, config.mesh.fsdp and config.mesh.tensor can be -1 (the rest)")
    if c.train.steps is None and c.train.epochs is None:
        errors.append("config.train.steps or config.train.epochs must be set")
    rows, microbatches = c.train.batch_size, c.train.microbatches
    if microbatches > 0 and rows % microbatches:
        errors.append(f"config.train.batch_size={rows} must be divisible by microbatches={microbatches}")
    if c.init_adapter and c.train.mode == "full":
        errors.append(f"config.init_adapter={c.init_adapter} must be None where train.mode is 'full'")
    if c.init_adapter and c.lora.init != "default":
        errors.append(
            f"config.lora.init={c.lora.init} draws new factors, but config.init_adapter has them; leave one out"
        )
    if c.optim.warmup_ratio is not None and c.optim.warmup_steps:
        errors.append("config.optim.warmup_steps and config.optim.warmup_ratio are both set; leave one out")
    if c.sample.every and not c.sample.prompts:
        errors.append("config.sample.prompts=() must be at least one where sample.every is set")
    sources = () if isinstance(c.data.train, str) else c.data.train or ()
    if c.data.mixture and len(c.data.mixture) != len(sources):
        errors.append(
            f"config.data.mixture={c.data.mixture} must have a weight for each of several data.train, which names "
            f"{len(sources) or 'one'}: give --config.data.train=\"('a.json','b.json')\""
        )
    if c.data.eval and c.data.eval_examples:
        errors.append(f"config.data.eval_examples={c.data.eval_examples} must be 0 where config.data.eval names a file")
    return errors


# ---- Values to typed fields ------------------------------------------------------------------------------------------


class Unparsed(str):
    """A value from the command line, not yet parsed as its key's type."""


def build(cls: Any, values: dict, prefix: str, errors: list[str]) -> Any:
    """A dataclass and those nested in it from dicts; every unknown key and every value of a wrong type joins `errors`."""
    hints = typing.get_type_hints(cls)
    fields = {}
    for key, value in values.items():
        name = f"config.{prefix}{key}"
        if key not in hints:
            unknown = flat({key: value}, prefix)
            errors += [f"config.{leaf} is no config key{did_you_mean(leaf)}" for leaf, _ in unknown]
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


def _convert(value: Any, hint: Any, commas: bool) -> Any:
    """`value` as the annotated type; ValueError says what it should be. `commas` separate the strings of a tuple."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in options and (value is None or (isinstance(value, Unparsed) and value in ("None", "none", ""))):
        return None
    if str in options and tuple[str, ...] in options:
        value = literal(value) if isinstance(value, Unparsed) and value.strip().startswith(("(", "[")) else value
        options = (str if isinstance(value, str) else tuple[str, ...],)
    (kind,) = [option for option in options if option is not types.NoneType]
    if kind is str:
        if isinstance(value, str):
            return str(value)
        raise ValueError("a string")
    if kind == COLUMNS:
        table = literal(value) if isinstance(value, Unparsed) else value
        if isinstance(table, (dict, tuple, list)) and all(
            isinstance(text, str) for pair in dict(table).items() for text in pair
        ):
            return tuple(sorted(dict(table).items()))
        raise ValueError("names of columns such as {'instruction': 'question'}")
    if kind in PER_TARGET:
        return _per_target(literal(value) if isinstance(value, Unparsed) else value, *PER_TARGET[kind])
    if kind == tuple[float, ...]:
        weights = literal(value) if isinstance(value, Unparsed) else value
        if isinstance(weights, (tuple, list)):
            return tuple(_convert(weight, float, commas=False) for weight in weights)
        raise ValueError("a list of numbers such as (0.7,0.3)")
    if typing.get_origin(kind) is tuple:
        if isinstance(value, Unparsed):
            value = literal(value) if value.strip().startswith(("(", "[")) else value
        if isinstance(value, str):
            value = tuple(part.strip() for part in value.split(",") if part) if commas else (str(value),) * bool(value)
        if isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ValueError("a list of strings such as ('one','two')")
    if isinstance(value, Unparsed):
        value = {"true": True, "false": False}.get(value.lower()) if kind is bool else literal(value)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is kind and kind is not float:
        return value
    raise ValueError({int: "a whole number", float: "a number", bool: "True or False"}[kind])


def _wanted(hint: Any) -> str:
    """What a value of the type must be."""
    try:
        return _convert(0, hint, commas=False)
    except ValueError as error:
        return str(error)


COLUMNS = tuple[tuple[str, str], ...]  # the annotation of `data.columns`
# Of `lora.ranks` and `lora.alphas`: the annotation -> the type of a value, and what it should be.
RANKS, ALPHAS = tuple[tuple[str, tuple[int, ...]], ...], tuple[tuple[str, tuple[float, ...]], ...]
PER_TARGET = {
    RANKS: (int, "ranks of targets such as {'down_proj': 32, 'q_proj': (8, 8, 4, 0)}"),
    ALPHAS: (float, "alphas of targets such as {'down_proj': 64.0}"),
}


def _per_target(value: Any, kind: type, wanted: str) -> tuple[tuple[str, tuple], ...]:
    """A table from targets to one value, or to one for each layer, as pairs of tuples in the order of TARGETS."""
    try:
        table = {target: literal(one) if isinstance(one, Unparsed) else one for target, one in dict(value).items()}
        table = {target: one if isinstance(one, (tuple, list)) else (one,) for target, one in table.items()}
        table = {target: tuple(_convert(one, kind, commas=False) for one in values) for target, values in table.items()}
    except (TypeError, ValueError):
        raise ValueError(wanted) from None
    if not all(isinstance(target, str) for target in table):
        raise ValueError(wanted)
    order = {target: i for i, target in enumerate(TARGETS)}
    return tuple(sorted(table.items(), key=lambda entry: order.get(entry[0], len(order))))


def literal(text: str) -> Any:
    """The Python literal that the text is, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def set_key(values: dict, key: str, value: Any) -> None:
    """Set a key such as "lora.rank" in nested dicts of config values, not checked yet."""
    try:
        set_path(values, key.split("."), value)
    except ValueError as error:
        raise UserError(f"config.{key} is no key: config.{error}") from None


def flat(values: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dicts -> (key, value) pairs with keys such as "lora.rank"."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def all_keys() -> list[str]:
    """Every key, in the order of the fields."""
    return [key for key, _ in flat(to_dict(Config()))]


def describe_keys(beginnings: tuple[str, ...] = ("",)) -> str:
    """For --help: the keys that begin so, with their defaults and what a value must be, below what their section says."""
    lines = ["config keys (--config.KEY=VALUE) and their defaults; docs/config.md says more:"]

    def add(section: Any, prefix: str, checks: Mapping[str, Any]) -> None:
        hints = typing.get_type_hints(type(section), include_extras=True)
        plain_hints = typing.get_type_hints(type(section))
        notes = {name: getattr(hint, "__metadata__", (checks.get(name),))[0] for name, hint in hints.items()}
        nested = {name: getattr(section, name) for name in hints if dataclasses.is_dataclass(getattr(section, name))}
        shown = [name for name in hints if name not in nested and f"{prefix}{name}".startswith(beginnings)]
        if shown:
            about = " ".join(section.__doc__.split())
            lines.extend(["", *textwrap.wrap(f"{prefix[:-1]}: {about}" if prefix else about, 80)])
        for name in shown:
            default, check = getattr(section, name), notes[name]
            # What no check lets pass, so that it says what a value must be.
            wrong: Any = "" if isinstance(default, str) else () if isinstance(default, tuple) else -math.inf
            must = (check and check(wrong)) or ""
            value = ",".join(default) if isinstance(default, tuple) else default
            if default == ():
                value = "{}" if plain_hints[name] in (COLUMNS, *PER_TARGET) else "()"
                must = must or _wanted(plain_hints[name])
            entry = f"{f'{prefix}{name}={value}':<32}  {must}"
            lines.extend(textwrap.wrap(entry, 80, initial_indent="  ", subsequent_indent=" " * 36))
        for name, below in nested.items():
            add(below, f"{prefix}{name}.", notes[name] or {})

    add(Config(), "", {})
    return "\n".join(lines)


# What PEFT, transformers, TRL, axolotl and mlx-lm call our keys.
OTHERS_WORDS = {
    "base": "model model_name model_name_or_path base_model",
    "init_adapter": "lora_model_dir resume_adapter_file adapter_name_or_path",
    "data.train": "dataset datasets dataset_name train_file train_data path data_path",
    "data.eval": "validation_file eval_file eval_dataset test_datasets",
    "data.eval_examples": "val_set_size",
    "data.max_length": "max_seq_length max_seq_len sequence_len seq_len seq_length cutoff_len",
    "data.packing": "sample_packing",
    "data.mixture": "interleave_probs probabilities mix_weights",
    "data.cache": "dataset_prepared_path cache_dir",
    "data.train_on_prompt": "train_on_inputs train_on_input",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "target_modules lora_target_modules lora_target target",
    "lora.scaling": "use_rslora",
    "lora.init": "init_lora_weights",
    "lora.ranks": "rank_pattern",
    "lora.alphas": "alpha_pattern",
    "train.steps": "max_steps iters num_steps num_train_steps",
    "train.epochs": "num_epochs num_train_epochs",
    "train.batch_size": "per_device_train_batch_size train_batch_size",
    "train.microbatches": "gradient_accumulation_steps grad_accumulation_steps",
    "optim.learning_rate": "lr",
    "optim.schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler",
    "optim.warmup_steps": "warmup num_warmup_steps",
    "optim.clip_norm": "max_grad_norm grad_clip gradient_clipping max_norm clip",
    "optim.b1": "adam_beta1 beta1",
    "optim.b2": "adam_beta2 beta2",
    "optim.eps": "adam_epsilon epsilon",
    "eval.every": "eval_steps steps_per_eval eval_every",
    "checkpoint.every": "save_steps save_every",
    "checkpoint.keep": "save_total_limit",
    "log.every": "logging_steps steps_per_report log_every",
    "log.wandb": "wandb_project",
    "remat": "gradient_checkpointing grad_checkpoint",
    "attention": "attn_implementation",
    "dtype": "bf16",
}


def did_you_mean(key: str, root: str = "config.") -> str:
    """By the whole key, its last part under another parent (`config.rank` for `config.lora.rank`), or others' word for it."""
    keys = all_keys()
    if meant := next((ours for ours, words in OTHERS_WORDS.items() if key.split(".")[-1] in words.split()), None):
        return f"; did you mean {root}{meant}?"
    same_leaf = [other for other in keys if other.split(".")[-1] == key.split(".")[-1]]
    close = same_leaf or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not close:
        by_leaf = {other.split(".")[-1]: other for other in keys}
        close = [by_leaf[leaf] for leaf in difflib.get_close_matches(key.split(".")[-1], by_leaf, n=1, cutoff=0.6)]
    return f"; did you mean {' or '.join(f'{root}{other}' for other in close)}?" if close else ""
