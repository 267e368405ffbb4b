"""Write what was trained in a form that others load: a PEFT adapter, or a whole Hugging Face model with it merged in.

    python -m lowrank.export --workdir=runs/alpaca --format=peft --to=exports/alpaca-lora
    python -m lowrank.export --workdir=runs/alpaca --format=merged --to=exports/alpaca

An export is read back before it is called done: every tensor is compared, and the logits of fixed tokens with those
of the trained model. The folder gets its name last, so a failure leaves nothing that looks like an export.
"""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lowrank import command, inference
from lowrank.data.tokenizer import load_tokenizer
from lowrank.errors import UserError
from lowrank.model import decoder
from lowrank.model.architecture import SIZES
from lowrank.model.decoder import Decoder
from lowrank.training import workdir as workdir_lib
from lowrank.weights.base import read_base, stored_params
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
FLAGS = flags.FLAGS

# The largest difference of a logit, relative to the largest logit, that rounding each tensor once may cause.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def main(arguments: list[str]):
    command.refuse_unknown(arguments)
    missing = [f"--{name}" for name in ("workdir", "format", "to") if not getattr(FLAGS, name)]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; see --help")
    workdir, to = pathlib.Path(FLAGS.workdir), pathlib.Path(FLAGS.to)
    run = workdir_lib.read_config(workdir)
    adapter = inference.read_adapter(workdir, FLAGS.step)
    base = None
    if run.base:
        base = read_base(FLAGS.base or run.base)
        trained_over = workdir_lib.read_record(workdir)["identity"]["base"]
        if base.fingerprint != trained_over:
            raise UserError(
                f"base {base.folder} has other weights than the adapter was trained over; name that one with --base"
            )
    architecture = base.config if base else SIZES[run.architecture]
    shapes, _ = decoder.abstract(Decoder(architecture, adapter.lora))

    if FLAGS.format == "peft":
        if adapter.lora is None:
            raise UserError(f"workdir {workdir} is a full fine-tuning: there is no adapter; use --format=merged")
        lora = adapter.restore({"lora": shapes["lora"]})["lora"]
        write_peft(to, jax.device_get(lora), adapter.lora, base_name=str(FLAGS.base or run.base))
        difference = compare(
            inference.load(base.folder, to, dtype="float32"), inference.load(base.folder, adapter, dtype="float32")
        )
        check(to, difference, "float32")
    elif adapter.lora is None:
        dtype = FLAGS.dtype or "float32"
        params = jax.device_get(adapter.restore(shapes)["params"])
        carry_from = base.folder if base else load_tokenizer(run.tokenizer).path.parent
        write_huggingface(to, params, architecture, dtype=dtype, carry_from=carry_from)
        trained = inference.Model(Decoder(architecture), {"params": params}, load_tokenizer(carry_from))
        check(to, compare(inference.load(to, dtype="float32"), trained), dtype)
    else:
        dtype = FLAGS.dtype or architecture.stored_dtype
        lora = jax.device_get(adapter.restore({"lora": shapes["lora"]})["lora"])
        params = merge(stored_params(base), lora, adapter.lora.scale, jnp.dtype(dtype))
        write_huggingface(to, params, architecture, dtype=dtype, carry_from=base.folder)
        difference = compare(inference.load(to, dtype="float32"), inference.load(base.folder, adapter, dtype="float32"))
        check(to, difference, dtype)


def compare(exported: inference.Model, trained: inference.Model) -> float:
    """The largest difference of a float32 logit on fixed tokens, relative to the largest logit."""
    vocab = trained.model.config.vocab
    ids = np.random.default_rng(0).integers(0, vocab, (2, 64))
    expected, found = np.asarray(trained.logits(ids)), np.asarray(exported.logits(ids))
    return float(np.abs(expected - found).max() / np.abs(expected).max())


def check(to: pathlib.Path, difference: float, dtype: str):
    if not difference <= TOLERANCE[dtype]:
        shutil.rmtree(to)
        raise UserError(
            f"export {to} did not compute what was trained and is removed: logits differed by {difference:.2g} of the "
            f"largest, more than {TOLERANCE[dtype]:g} for {dtype}; try --dtype=float32"
        )
    print(f"exported to {to}; read back, every tensor equal, logits within {difference:.2g} of the largest ({dtype})")


if __name__ == "__main__":
    command.run(main)
