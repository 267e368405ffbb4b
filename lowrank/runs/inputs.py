"""What a config names, found and read before anything is computed: base, tokenizer, examples; and a run's first variables.

Whatever a user can get wrong with these is refused here, before anything heavy begins.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from lowrank import config as config_lib
from lowrank.adapters.lora import LoraConfig
from lowrank.config import Config
from lowrank.data import examples as examples_lib
from lowrank.data import files, loader, packing
from lowrank.data.batch import Batch
from lowrank.data.cache import Data, read_examples
from lowrank.data.examples import Examples
from lowrank.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.families.sizes import SIZES
from lowrank.files import paths
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.parallel import mesh as mesh_lib
from lowrank.runs import workdir as workdir_lib
from lowrank.runs.adapter import Adapter, refuse_other_layers
from lowrank.runs.console import counting
from lowrank.weights.base import Base, read_base
from lowrank.weights.load import load_params

CACHED = 1_000_000  # bytes of data from which on the tokens are kept: some two seconds of encoding


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """What a run reads before it begins."""

    base: Base | None  # None: a model is trained from scratch
    architecture: ModelConfig
    tokenizer: Tokenizer
    format: str  # of the records
    train: Examples
    held_out: Examples | None
    rows: int  # of an epoch in file order; shuffled, it differs by a few
    fill: float  # share of the rows' slots that hold a token
    steps: int  # of the whole run


def prepare(config: Config, workdir: paths.Path | None = None) -> RunInputs:
    """`workdir`: the tokens of large data are written beside it."""
    base, architecture, tokenizer = find_model(config)
    format, train, held_out = read_data(config, tokenizer, workdir)
    rows, fill = epoch_rows(config, train)
    refuse_other_layers(config.lora, architecture.layers)
    return RunInputs(base, architecture, tokenizer, format, train, held_out, rows, fill, steps_over(rows, config))


def epoch_rows(config: Config, examples: Examples) -> tuple[int, float]:
    """Rows of an epoch in file order, and the share of their inputs that is not padding."""
    return packing.packed_rows(loader.epoch_lengths(examples, config.data.mixture), **row_shape(config))


def steps_over(rows: int, config: Config) -> int:
    """The number of steps that the config asks for over data of so many rows."""
    return config.train.steps or math.ceil((config.train.epochs or 0) * rows / config.train.batch_size)


def check_mesh(mesh: Mesh, config: Config, architecture: ModelConfig):
    mesh_lib.check_rows(mesh, config.train.batch_size, config.train.microbatches)
    mesh_lib.check_heads(mesh, architecture.heads, architecture.kv_heads)


def identity(config: Config, inputs: RunInputs) -> dict:
    """What must be unchanged for a run to resume: files by content, not by path."""
    return {
        "base": inputs.base.fingerprint if inputs.base else f"from scratch, seed {config.seed}",
        "architecture": dataclasses.asdict(inputs.architecture),
        "tokenizer": paths.file_hash(inputs.tokenizer.path),
        "data.train": files.content_hash(config.data.train),
        "data.eval": files.content_hash(config.data.eval),
    }


def facts(config: Config, run_identity: dict) -> dict[str, str]:
    """What must be the same in all processes of a run, as short texts: files by content, not by path."""
    values = config_lib.flat(config_lib.to_dict(config))
    settings = {f"config.{key}": repr(value) for key, value in values if key not in workdir_lib.PATHS}
    contents = {name: str(value) for name, value in run_identity.items() if name != "architecture"}
    settings["config.init_adapter"] = "set" if config.init_adapter else "not set"
    return settings | contents | workdir_lib.versions() | {"the code of lowrank": workdir_lib.code_hash()}


def find_model(config: Config) -> tuple[Base | None, ModelConfig, Tokenizer]:
    """-> (the base, or None where the named architecture is trained from scratch; the architecture; the tokenizer)."""
    base = read_base(config.base) if config.base else None
    architecture = architecture_of(config, base.config if base else None)
    if architecture is None or (base is None and config.train.mode != "full"):
        raise UserError(
            "config.base is missing; say --config.base=DIR, the folder of a checkpoint, or its name on the hub"
        )
    place = config.tokenizer or config.base
    if not place:
        raise UserError("config.tokenizer is missing; a model from scratch needs the folder of a tokenizer")
    tokenizer = load_tokenizer(config.tokenizer or (base.folder if base else place))
    check_vocab(tokenizer, architecture.vocab, place)
    return base, architecture, tokenizer


def architecture_of(config: Config, base: ModelConfig | None) -> ModelConfig | None:
    """The base's architecture, or without a base the one that `config.architecture` names.

    UserError where the base is another one than is named, and for examples longer than the model reads.
    """
    name, length = config.architecture, config.data.max_length
    if name and name not in SIZES:
        raise UserError(f"config.architecture={name} is not one of {', '.join(SIZES)}")
    named = SIZES[name] if name else None
    found = base or named
    if named and found and (differing := named.shape_differences(found)):
        raise UserError(
            f"config.base={config.base} is no {name}, which config.architecture says it is: {'; '.join(differing)}; "
            "give another base, or --config.architecture=None"
        )
    if found and length > found.max_length:
        raise UserError(
            f"config.data.max_length={length} is more than the model reads ({found.max_length} positions); "
            f"say --config.data.max_length={found.max_length} or less"
        )
    return found


def read_data(
    config: Config, tokenizer: Tokenizer, workdir: paths.Path | None = None
) -> tuple[str, Examples, Examples | None]:
    """-> the records' format; the training examples; the held-out ones or None."""
    data = config.data
    if not data.train:
        raise UserError("config.data.train is missing; say --config.data.train=FILE")

    def read(where, format):
        sources = files.sources_of(where)
        making = (dict(data.columns), data.system, data.max_length, data.train_on_prompt, data.overflow)
        return read_examples(
            Data(sources, format, *making), tokenizer, _cache_folder(config, sources, workdir), counting
        )

    format, train = read(data.train, data.format)
    if config.eval.answers and (format == "text" or data.train_on_prompt):
        raise UserError(
            "config.eval.answers needs examples with a prompt and a response: not text, not train_on_prompt"
        )
    if data.eval:
        return format, train, read(data.eval, format)[1]
    if data.eval_examples:
        return format, *examples_lib.split(train, data.eval_examples)
    if config.eval.every or config.eval.answers:
        raise UserError(
            "config.eval is set but there is nothing to evaluate on; set config.data.eval or data.eval_examples"
        )
    return format, train, None


def _cache_folder(config: Config, sources: Sequence[str], workdir: paths.Path | None) -> paths.Path | None:
    """Where the tokens of these sources are kept; None for data that is encoded in a second."""
    if config.data.cache:
        return paths.path(config.data.cache)
    if workdir is None or files.total_size(sources) < CACHED:
        return None
    is_mount = isinstance(workdir, pathlib.Path) and workdir.is_mount()  # what lies beside it is on another disk
    return (workdir if is_mount else workdir.parent) / workdir_lib.TOKENS


def with_format(config: Config, format: str) -> Config:
    """The config with the format that `auto` has found."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, format=format))


def row_shape(config: Config) -> dict:
    return {"max_length": config.data.max_length, "packing": config.data.packing}


def training_batches(config: Config, examples: Examples) -> loader.TrainLoader:
    return loader.TrainLoader(
        examples,
        batch_size=config.train.batch_size,
        shuffle=config.data.shuffle,
        seed=config.seed if config.data.seed is None else config.data.seed,
        mixture=config.data.mixture,
        **row_shape(config),
    )


def evaluation_batches(config: Config, held_out: Examples | None) -> list[Batch]:
    """Batches of as many rows as a micro-batch has; none if nothing is held out."""
    rows = config.train.batch_size // config.train.microbatches
    if not held_out:
        return []
    return [loaded.batch for loaded in loader.evaluation_batches(held_out, batch_size=rows, **row_shape(config))]


def initial_variables(
    config: Config, model: Decoder, base: Base | None, shapes: dict, made: set[str], start: Adapter | None = None
) -> dict:
    """The variables before step 1, laid out as `shapes`; collections that are not in `made` stay shapes.

    `start`: the adapter of `config.init_adapter`.
    """
    key = jax.random.key(config.seed)
    variables = dict(shapes)
    if "params" in made and base:
        variables["params"] = load_params(base, shapes["params"])
    elif "params" in made:
        layout = jax.tree.map(lambda leaf: leaf.sharding, shapes["params"])
        variables["params"] = jax.jit(lambda key: decoder.init(model, key)["params"], out_shardings=layout)(key)
    if "lora" in made and start:
        variables["lora"] = start.restore({"lora": shapes["lora"]})["lora"]
    elif "lora" in made:
        # Initial values depend on the ranks alone: a sweep's members of equal ranks share the program.
        lora = config.lora
        ranks = LoraConfig(rank=lora.rank, ranks=lora.ranks, targets=lora.targets, init=lora.init)
        layout = jax.tree.map(lambda leaf: leaf.sharding, shapes["lora"])
        variables["lora"] = jax.tree.map(mesh_lib.put, _init_adapter(Decoder(model.config, ranks), key), layout)
    return variables


@functools.partial(jax.jit, static_argnums=0)
def _init_adapter(model: Decoder, key: jax.Array) -> dict:
    return decoder.init(model, key)["lora"]
