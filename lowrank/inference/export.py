"""Export what a run trained in a form that others load: a PEFT adapter, or a Hugging Face model with it merged in.

It stands in `inference` because an export is done only when it was loaded back and computes the trained model's logits. The
folder gets its name last, so a failure leaves nothing that looks like an export. Its README.md is a model card.
"""

import dataclasses
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapters.lora import padding_size
from lowrank.config import Config
from lowrank.data.tokenizer import load_tokenizer, write_tokenizer
from lowrank.errors import UserError
from lowrank.families.sizes import SIZES
from lowrank.files import lines, paths
from lowrank.files.new_folder import carry, new_folder
from lowrank.inference.model import Model, load
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

# The largest difference of a logit, relative to the largest logit, that rounding each tensor once may cause.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Export:
    """A verified export."""

    folder: pathlib.Path
    dtype: str  # of its tensors
    difference: float  # the largest of a logit from the trained model's, relative to the largest logit


def export(
    workdir: str | os.PathLike,
    to: str | os.PathLike,
    format: str,
    *,
    step: int | None = None,
    base: str | os.PathLike | None = None,
    base_name: str | None = None,
    dtype: str | None = None,
) -> Export:
    """Write what a run trained into the new folder `to`: the adapter ("peft") or the whole model ("merged").

    `step`: which checkpoint (None: the latest). `base`: where the base lies now (None: where it lay in training).
    `base_name`: what the export calls its base (None: its path). `dtype`: of merged tensors (None: as the base is
    stored). Raises UserError, also where the export computes other logits than the trained model.
    """
    workdir, to = paths.path(workdir), paths.local(to)
    run, adapter = workdir_lib.read_config(workdir), read_adapter(workdir, step)
    if format == "peft" and adapter.lora is None:
        raise UserError(f"workdir {workdir} is a full fine-tuning: there is no adapter; use format=merged")
    if format == "peft" and dtype not in (None, "float32"):
        raise UserError(f"dtype={dtype} is for format=merged; an adapter is exported in float32, as it is trained")
    source = read_base(base or run.base) if run.base else None
    if source and source.fingerprint != adapter.base:
        raise UserError(f"base {source.folder} has other weights than the adapter was trained over; give that base")
    if source and not base_name and (source.folder / native.MANIFEST).is_file():
        warnings.warn(
            f"{source.folder} is a native base, which others cannot load; base_name says what to load", stacklevel=2
        )
    base_name = base_name or str(base or run.base or run.architecture)
    with new_folder(to) as folder:
        model = load_trained(run, adapter, source)
        expected = fixed_logits(model)
        architecture, tokenizer = model.model.config, model.tokenizer
        trained = jax.device_get(model.variables["lora" if adapter.lora else "params"])
        del model  # one model is in memory at a time
        if format == "peft":
            dtype = "float32"
            write_peft(folder, trained, adapter.lora, base_name=base_name)
        else:
            dtype = dtype or (architecture.stored_dtype if adapter.lora else "float32")
            params = merge(source.params, trained, adapter.lora, jnp.dtype(dtype)) if adapter.lora else trained
            ends = {"bos_id": tokenizer.bos_id, "eos_ids": (tokenizer.eos_id,)} if run.tokenizer else {}
            write_huggingface(folder, params, dataclasses.replace(architecture, **ends), dtype=dtype)
            if source and not run.tokenizer:  # its ids would be of another tokenizer
                carry(source.folder, folder, ["generation_config.json"])
            del params
        if format == "merged" or run.tokenizer:  # an adapter goes with its base's, unless it has one of its own
            write_tokenizer(tokenizer, folder)
        found = fixed_logits(load_export(folder, source if format == "peft" else None))
        difference = float(np.abs(expected - found).max() / np.abs(expected).max())
        if not difference <= TOLERANCE[dtype]:
            raise UserError(
                f"export {to} did not compute what was trained and is removed: logits differed by {difference:.2g} of the "
                f"largest, more than {TOLERANCE[dtype]:g} for {dtype}; try dtype=float32"
            )
        facts = {"name": to.absolute().name, "format": format, "dtype": dtype, "difference": difference}
        card = model_card(
            record=workdir_lib.read_record(workdir),
            lines=lines.read_lines(workdir / "metrics.jsonl"),
            step=adapter.step,
            lora=adapter.lora,
            trained=partition.count(trained) - (padding_size(adapter.lora, architecture) if adapter.lora else 0),
            base=base_name,
            export=facts | {"tolerance": TOLERANCE[dtype]},
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Export(to, dtype, difference)


# Models are held as they are stored and computed in float32: exact, and half the memory of holding them in float32.


def load_trained(run: Config, adapter: Adapter, base: Base | None) -> Model:
    if base is None:  # trained from scratch
        model = Decoder(SIZES[run.architecture])
        return Model(model, adapter.restore(decoder.abstract(model)[0]), load_tokenizer(run.tokenizer))
    param_dtype = base.config.stored_dtype if adapter.lora else "float32"
    return load(base, adapter, dtype="float32", param_dtype=param_dtype)


def load_export(folder: pathlib.Path, base: Base | None) -> Model:
    """A PEFT folder over `base`, or (None) a merged model."""
    source = base or read_base(folder)
    return load(source, folder if base else None, dtype="float32", param_dtype=source.config.stored_dtype)


def fixed_logits(model: Model) -> np.ndarray:
    """float32 [2, 64, V], of tokens that are always the same."""
    ids = np.random.default_rng(0).integers(0, model.model.config.vocab, (2, 64))
    return np.asarray(model.logits(ids))
