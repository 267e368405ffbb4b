"""Write what was trained in a form that others load: a PEFT adapter, or a whole Hugging Face model with it merged in.

    python -m lowrank.export --workdir=runs/alpaca --format=peft --to=exports/alpaca-lora
    python -m lowrank.export --workdir=runs/alpaca --format=merged --to=exports/alpaca

An export is read back before it is called done: every tensor is compared, and the logits of fixed tokens with those
of the trained model. The folder gets its name last, so a failure leaves nothing that looks like an export.
"""

import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from lowrank import command, inference
from lowrank.data.tokenizer import load_tokenizer
from lowrank.errors import UserError
from lowrank.model import decoder
from lowrank.model.architecture import SIZES, ModelConfig
from lowrank.model.decoder import Decoder
from lowrank.training import workdir as workdir_lib
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
FLAGS = flags.FLAGS

Load = Callable[[], inference.Model]

# The largest difference of a logit, relative to the largest logit, that rounding each tensor once may cause.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


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
        trained_over = adapter.base
        if base.fingerprint != trained_over:
            raise UserError(
                f"base {base.folder} has other weights than the adapter was trained over; name that one with --base"
            )
    architecture = base.config if base else SIZES[run.architecture]
    shapes, _ = decoder.abstract(Decoder(architecture, adapter.lora))

    if FLAGS.format == "peft" and adapter.lora is None:
        raise UserError(f"workdir {workdir} is a full fine-tuning: there is no adapter; use --format=merged")
    if FLAGS.format == "peft":
        dtype = "float32"
        lora = adapter.restore({"lora": shapes["lora"]})["lora"]
        write_peft(to, jax.device_get(lora), adapter.lora, base_name=str(FLAGS.base or run.base))
        exported = lambda: inference.load(base.folder, to, dtype="float32")  # noqa: E731
    else:
        dtype = FLAGS.dtype or ("float32" if adapter.lora is None else architecture.stored_dtype)
        if adapter.lora is None:
            params = jax.device_get(adapter.restore(shapes)["params"])
        else:
            lora = jax.device_get(adapter.restore({"lora": shapes["lora"]})["lora"])
            params = merge(base.params, lora, adapter.lora.scale, jnp.dtype(dtype))
        carry_from = base.folder if base else load_tokenizer(run.tokenizer).path.parent
        write_huggingface(to, params, architecture, dtype=dtype, carry_from=carry_from)
        del params
        exported = lambda: inference.load(to, dtype="float32")  # noqa: E731

    try:
        check(exported, lambda: trained_model(adapter, base, architecture, to), to, dtype)
    except BaseException:  # an interrupt, too: what is not verified must not look like an export
        shutil.rmtree(to)
        raise


def trained_model(adapter: inference.Adapter, base: Base | None, architecture: ModelConfig, to: pathlib.Path):
    if base is not None:
        return inference.load(base.folder, adapter, dtype="float32")
    model = Decoder(architecture)
    return inference.Model(model, adapter.restore(decoder.abstract(model)[0]), load_tokenizer(to))


def check(exported: Load, trained: Load, to: pathlib.Path, dtype: str):
    """Compare float32 logits on fixed tokens; one model is in memory at a time."""
    found, expected = fixed_logits(exported()), fixed_logits(trained())
    difference = float(np.abs(expected - found).max() / np.abs(expected).max())
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"export {to} did not compute what was trained and is removed: logits differed by {difference:.2g} of the "
            f"largest, more than {TOLERANCE[dtype]:g} for {dtype}; try --dtype=float32"
        )
    print(f"exported to {to}; read back, every tensor equal, logits within {difference:.2g} of the largest ({dtype})")


def fixed_logits(model: inference.Model) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, model.model.config.vocab, (2, 64))
    return np.asarray(model.logits(ids))


if __name__ == "__main__":
    command.run(main)
