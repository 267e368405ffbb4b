"""Export what a run trained in a form that others load: a PEFT adapter, or a Hugging Face model with it merged in.

An export is done only when it was loaded back and computes the trained model's logits; a failure leaves nothing. Its README.md
is a model card.
"""

import dataclasses
import json
import math
import pathlib
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapters.lora import padding_size
from lowrank.config import Config
from lowrank.data import chat
from lowrank.data.tokenizer import Tokenizer, load_tokenizer, write_tokenizer
from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.families.sizes import SIZES
from lowrank.files import hub, lines, paths
from lowrank.files.new_folder import carry, new_folder
from lowrank.inference.model import Model, load
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.runs import workdir as workdir_lib
from lowrank.runs.adapter import Adapter, choose_step, read_adapter, split_step
from lowrank.runs.card import model_card
from lowrank.runs.metrics import read_evaluations
from lowrank.training import partition
from lowrank.weights import native
from lowrank.weights.base import Base, read_base
from lowrank.weights.merged import merge, write_huggingface
from lowrank.weights.peft import write_peft

# The largest difference of a logit, relative to the largest logit, that rounding each tensor once may cause.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


class Export(NamedTuple):
    """A verified export."""

    folder: pathlib.Path
    dtype: str  # of its tensors
    difference: float  # the largest of a logit from the trained model's, relative to the largest logit
    step: int  # that was exported
    better: (
        tuple[int, float, float | None] | None
    )  # a saved step of lower evaluation loss, its loss and the exported one's
    url: str | None  # of the commit, where it was uploaded


def export(
    workdir,
    to,
    format: str,
    *,
    step: int | str | None = None,
    base=None,
    base_name: str | None = None,
    dtype: str | None = None,
    push: str | None = None,
) -> Export:
    """Write what a run trained into the new folder `to`: the adapter ("peft") or the whole model ("merged").

    `step`: which checkpoint: a number, "best" (by evaluation loss) or "last" (as None). `base`: where the base lies now
    (None: where it lay in training).
    `base_name`: what the export calls its base (None: its path or its name on the hub). `dtype`: of merged tensors (None: as
    the base is stored). `push`: where to upload the folder and the run's record, org/name or org/name@branch. Raises
    UserError, also where the export computes other logits than the trained model.
    """
    if format not in ("peft", "merged"):
        raise UserError(f"format={format} is no format of an export; choose peft or merged")
    (run_folder, step), to = split_step(workdir, step), paths.local(to)
    run, adapter = workdir_lib.read_config(run_folder), read_adapter(run_folder, step)
    lora = adapter.lora
    assert adapter.step is not None  # of a workdir
    if format == "peft" and lora is None:
        raise UserError(f"workdir {workdir} is a full fine-tuning: there is no adapter; use format=merged")
    if format == "peft" and dtype not in (None, "float32"):
        raise UserError(f"dtype={dtype} is for format=merged; an adapter is exported in float32, as it is trained")
    source = read_base(base or run.base) if run.base else None
    if source and source.fingerprint != adapter.base:
        raise UserError(f"base {source.folder} has other weights than the adapter was trained over; give that base")
    if source and not base_name and (source.folder / native.MANIFEST).is_file():
        message = f"{source.folder} is a native base, which others cannot load; base_name says what to load"
        warnings.warn(message, stacklevel=2)
    on_hub = hub.match(base or run.base)
    if push and format == "peft" and not on_hub and not base_name:
        raise UserError(f"push={push}: others cannot load the base by {base or run.base}; say base_name=org/name")
    if push:
        hub.create(push)
    revision = on_hub["revision"] if on_hub and not base_name else None
    base_name = base_name or (on_hub["name"] if on_hub else str(base or run.base or run.architecture))
    with new_folder(to) as folder:
        model = load_trained(run, adapter, source)
        expected = fixed_logits(model)
        architecture, tokenizer = model.model.config, model.tokenizer
        trained = jax.device_get(model.variables["lora" if lora else "params"])
        del model  # one model is in memory at a time
        if lora and format == "peft":
            dtype = "float32"
            write_peft(folder, trained, lora, base_name=base_name, revision=revision)
        else:
            dtype = dtype or (architecture.stored_dtype if lora else "float32")
            params = merge(source.params, trained, lora, jnp.dtype(dtype)) if source and lora else trained
            written = architecture
            if run.tokenizer:  # not the base's, so other ids begin and end a text
                assert tokenizer.eos_id is not None  # nothing is trained without one
                written = dataclasses.replace(written, bos_id=tokenizer.bos_id, eos_ids=(tokenizer.eos_id,))
            write_huggingface(folder, params, written, dtype=dtype)
            if source and not run.tokenizer:
                carry(source.folder, folder, ["generation_config.json"])
            write_ends(folder, written, tokenizer)
            del params
        if format == "merged" or run.tokenizer:  # an adapter goes with its base's, unless it has one of its own
            write_tokenizer(tokenizer, folder)
        under = source if source and format == "peft" else read_base(folder)
        options = {"dtype": "float32", "param_dtype": under.config.stored_dtype}
        found = fixed_logits(load(under, folder if format == "peft" else None, **options))
        difference = float(np.abs(expected - found).max() / np.abs(expected).max())
        if not difference <= TOLERANCE[dtype]:
            raise UserError(
                f"export {to} did not compute what was trained and is removed: logits differed by {difference:.2g} of the "
                f"largest, more than {TOLERANCE[dtype]:g} for {dtype}; try dtype=float32"
            )
        facts = {"name": to.absolute().name, "format": format, "dtype": dtype, "tolerance": TOLERANCE[dtype]}
        facts["ends"] = sorted({*architecture.eos_ids, *chat.end_ids(tokenizer)})
        card = model_card(
            record=workdir_lib.read_record(run_folder),
            lines=lines.read_lines(run_folder / "metrics.jsonl"),
            step=adapter.step,
            lora=lora,
            trained=partition.count(trained) - (padding_size(lora, architecture) if lora else 0),
            base=base_name,
            export=facts | {"difference": difference},
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    files = [run_folder / name for name in ("config.json", "metrics.jsonl")]
    logs = {f"training/{file.name}": file for file in files if file.is_file()}
    try:
        url = hub.push(to, push, logs) if push else None
        return Export(to, dtype, difference, adapter.step, better_step(run_folder, adapter.step), url)
    except UserError as error:
        raise UserError(
            f"{error}; the export itself is whole, in {to}, and `hf upload` can upload it"
        ) from error.__cause__


def write_ends(folder: pathlib.Path, architecture: ModelConfig, tokenizer: Tokenizer) -> None:
    """Write what ends a text into generation_config.json; what ends a turn of the chat template comes first."""
    file = folder / "generation_config.json"
    try:
        settings = json.loads(file.read_bytes()) if file.is_file() else {"bos_token_id": architecture.bos_id}
        ends = settings.get("eos_token_id", architecture.eos_ids)
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"the base's {file.name} holds no JSON object ({error}); fetch it again, or remove it"
        ) from None
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    missing = [i for i in sorted(chat.end_ids(tokenizer), key=lambda i: i == tokenizer.eos_id) if i not in ends]
    settings["eos_token_id"] = [i for i in (*missing, *ends) if i is not None]
    if missing or not file.is_file():
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def better_step(workdir: paths.Path, step: int) -> tuple[int, float, float | None] | None:
    """-> (a saved step of lower evaluation loss, its loss, that of `step`), or None where `step` is the best known."""
    losses = read_evaluations(workdir)
    if not losses:
        return None
    best = choose_step(workdir, "best")
    return (best, losses[best], losses.get(step)) if losses[best] < losses.get(step, math.inf) else None


def load_trained(run: Config, adapter: Adapter, base: Base | None) -> Model:
    """Computes in float32; held as stored, which is exact and half the memory."""
    if base is None:  # trained from scratch
        assert run.architecture and run.tokenizer
        model = Decoder(SIZES[run.architecture])
        return Model(model, adapter.restore(decoder.abstract(model)[0]), load_tokenizer(run.tokenizer))
    return load(base, adapter, dtype="float32", param_dtype=base.config.stored_dtype if adapter.lora else "float32")


def fixed_logits(model: Model) -> np.ndarray:
    """float32 [2, 64, V], of the same tokens each time."""
    ids = np.random.default_rng(0).integers(0, model.model.config.vocab, (2, 64))
    return np.asarray(model.logits(ids))
