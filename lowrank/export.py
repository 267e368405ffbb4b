"""Write what was trained in a form that others load: a PEFT adapter, or a whole Hugging Face model with it merged in.

    python -m lowrank.export --workdir=runs/alpaca --format=peft --to=exports/alpaca-lora
    python -m lowrank.export --workdir=runs/alpaca --format=merged --to=exports/alpaca

An export is read back before it is called done: every tensor is compared, and the logits of fixed tokens with those
of the trained model. The folder gets its name last, so a failure leaves nothing that looks like an export. Its README.md
is a model card, written from the run.
"""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lowrank.adapters.lora import padding
from lowrank.cli import run as cli
from lowrank.data.tokenizer import load_tokenizer, write_tokenizer
from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.families.sizes import SIZES
from lowrank.files import lines as lines_lib
from lowrank.files import paths
from lowrank.files.new_folder import carry, new_folder
from lowrank.inference import model as model_lib
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.runs import workdir as workdir_lib
from lowrank.runs.adapter import Adapter, read_adapter
from lowrank.runs.card import model_card
from lowrank.training import partition
from lowrank.weights import native
from lowrank.weights.base import Base, read_base
from lowrank.weights.merged import merge, write_huggingface
from lowrank.weights.peft import write_peft

flags.DEFINE_string("workdir", None, "The workdir of the run.")
flags.DEFINE_integer("step", None, "Which checkpoint; default: the latest.")
flags.DEFINE_enum("format", None, ["peft", "merged"], "peft: the adapter alone; merged: the whole model.")
flags.DEFINE_string("to", None, "The folder to make.")
flags.DEFINE_string("base", None, "The base, if it is no longer where it was in training.")
flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Of merged tensors; default: as the base is stored."
)
flags.DEFINE_string(
    "base_name", None, "What the export calls its base: a name on a hub or a path. Default: where the base lies here."
)
FLAGS = flags.FLAGS

# The largest difference of a logit, relative to the largest logit, that rounding each tensor once may cause.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def main(arguments: list[str]):
    cli.refuse_unknown(arguments)
    missing = [f"--{name}" for name in ("workdir", "format", "to") if not getattr(FLAGS, name)]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; see --help")
    workdir, to = paths.path(FLAGS.workdir), paths.local(FLAGS.to)
    run = workdir_lib.read_config(workdir)
    adapter = read_adapter(workdir, FLAGS.step)
    if FLAGS.format == "peft" and adapter.lora is None:
        raise UserError(f"workdir {workdir} is a full fine-tuning: there is no adapter; use --format=merged")
    if FLAGS.format == "peft" and FLAGS.dtype not in (None, "float32"):
        raise UserError(
            f"--dtype={FLAGS.dtype} is for --format=merged; an adapter is exported in float32, as it is trained"
        )
    base = open_base(run.base, adapter) if run.base else None
    architecture = base.config if base else SIZES[run.architecture]
    shapes, _ = decoder.abstract(Decoder(architecture, adapter.lora))
    base_name = FLAGS.base_name or str(FLAGS.base or run.base or run.architecture)
    if base and not FLAGS.base_name and (base.folder / native.MANIFEST).is_file():
        print(
            f"{base.folder} is a native base, which others cannot load; --base_name=NAME says what to load",
            file=sys.stderr,
        )
    tokenizer = load_tokenizer(run.tokenizer or base.folder)

    with new_folder(to) as folder:
        if FLAGS.format == "peft":
            dtype, trained = "float32", shapes["lora"]
            lora = jax.device_get(adapter.restore({"lora": shapes["lora"]})["lora"])
            write_peft(folder, lora, adapter.lora, base_name=base_name)
        else:
            dtype = FLAGS.dtype or ("float32" if adapter.lora is None else architecture.stored_dtype)
            trained = shapes["lora" if adapter.lora else "params"]
            params = merged_params(adapter, base, shapes, dtype)
            ends = {"bos_id": tokenizer.bos_id, "eos_ids": (tokenizer.eos_id,)} if run.tokenizer else {}
            write_huggingface(folder, params, dataclasses.replace(architecture, **ends), dtype=dtype)
            if base and not run.tokenizer:  # its ids would be of another tokenizer
                carry(base.folder, folder, ["generation_config.json"])
            del params  # one model is in memory at a time
        if FLAGS.format == "merged" or run.tokenizer:  # an adapter goes with its base's, unless it has one of its own
            write_tokenizer(tokenizer, folder)
        found = fixed_logits(load_export(folder, base))
        expected = fixed_logits(load_trained(adapter, base, architecture, tokenizer_of=run.tokenizer))
        difference = float(np.abs(expected - found).max() / np.abs(expected).max())
        if not difference <= TOLERANCE[dtype]:
            raise UserError(
                f"export {to} did not compute what was trained and is removed: logits differed by {difference:.2g} of the "
                f"largest, more than {TOLERANCE[dtype]:g} for {dtype}; try --dtype=float32"
            )
        export = {"name": to.absolute().name, "format": FLAGS.format, "dtype": dtype, "difference": difference}
        card = model_card(
            record=workdir_lib.read_record(workdir),
            lines=lines_lib.read_lines(workdir / "metrics.jsonl"),
            step=adapter.step,
            lora=adapter.lora,
            trained=partition.count(trained) - (padding(adapter.lora, architecture) if adapter.lora else 0),
            base=base_name,
            export=export | {"tolerance": TOLERANCE[dtype]},
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"exported to {to}; read back, every tensor equal, logits within {difference:.2g} of the largest ({dtype})")


def open_base(named: str, adapter: Adapter) -> Base:
    """The base that was trained over, wherever it lies now."""
    base = read_base(FLAGS.base or named)
    if base.fingerprint != adapter.base:
        raise UserError(
            f"base {base.folder} has other weights than the adapter was trained over; name that one with --base"
        )
    return base


def merged_params(adapter: Adapter, base: Base | None, shapes: dict, dtype: str) -> dict:
    """The whole model's parameters: what a full fine-tuning holds, or the base with the adapter merged into it."""
    if adapter.lora is None:
        return jax.device_get(adapter.restore(shapes)["params"])
    lora = jax.device_get(adapter.restore({"lora": shapes["lora"]})["lora"])
    return merge(base.params, lora, adapter.lora, jnp.dtype(dtype))


# Models are held as they are stored and computed in float32: exact, and half the memory of holding them in float32.


def load_export(folder: pathlib.Path, base: Base | None) -> model_lib.Model:
    if FLAGS.format == "peft":
        return model_lib.load(base.folder, folder, dtype="float32", param_dtype=base.config.stored_dtype)
    return model_lib.load(folder, dtype="float32", param_dtype=read_base(folder).config.stored_dtype)


def load_trained(
    adapter: Adapter, base: Base | None, architecture: ModelConfig, tokenizer_of: str | None
) -> model_lib.Model:
    if base is None:
        model = Decoder(architecture)
        return model_lib.Model(model, adapter.restore(decoder.abstract(model)[0]), load_tokenizer(tokenizer_of))
    param_dtype = "float32" if adapter.lora is None else base.config.stored_dtype
    return model_lib.load(base.folder, adapter, dtype="float32", param_dtype=param_dtype)


def fixed_logits(model: model_lib.Model) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, model.model.config.vocab, (2, 64))
    return np.asarray(model.logits(ids))


if __name__ == "__main__":
    cli.run(main)
