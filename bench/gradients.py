"""How far gradients computed in bfloat16 are from those in float32: lowrank's, and PEFT's on the same weights and tokens.

    python bench/gradients.py [--seeds=6]

A random LLaMA of 4 layers of 128 with weights that are bfloat16 numbers, an adapter of rank 16 on all seven projections, 2
rows of 130 tokens. The error is that of a factor of one layer, |bfloat16's - float32's| / |float32's|; float32 is each library's own
(the two are equal: tests/test_training_parity.py).
"""

import os
import pathlib
import statistics
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from absl import app, flags

from lowrank.adapters.config import TARGETS
from lowrank.data.batch import Batch
from lowrank.families.config import ModelConfig
from lowrank.families.config_json import hf_config
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.training import partition
from lowrank.training.step import loss_sum
from lowrank.weights.base import read_base
from lowrank.weights.load import load_params
from lowrank.weights.peft import read_peft

flags.DEFINE_integer("seeds", 6, "So many models, each with tokens of its own.")
FLAGS = flags.FLAGS

MODEL = ModelConfig(512, 128, 384, 4, 4, 2, 32, stored_dtype="bfloat16")
ROWS, LENGTH = 2, 130


def write(folder: str, seed: int):
    torch.manual_seed(seed)
    fields = {k: v for k, v in hf_config(MODEL).items() if k not in ("architectures", "torch_dtype", "model_type")}
    config = transformers.LlamaConfig(**fields, initializer_range=MODEL.embed**-0.5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(f"{folder}/base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=list(TARGETS)))
    with torch.no_grad():
        for name, factor in adapted.named_parameters():
            if "lora_B" in name:
                factor.normal_(0, 0.02)
            if "lora_" in name:
                factor.copy_(factor.bfloat16())
    adapted.save_pretrained(f"{folder}/adapter")


def of_peft(folder: str, tokens, dtype: torch.dtype, adapter_in_float32: bool) -> list[np.ndarray]:
    """Gradients of lora_A and lora_B of every layer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=dtype)
    model = peft.PeftModel.from_pretrained(
        model, f"{folder}/adapter", is_trainable=True, autocast_adapter_dtype=adapter_in_float32
    )
    tokens = torch.tensor(tokens)
    model(input_ids=tokens, labels=tokens).loss.backward()
    return [weight.grad.float().numpy() for weight in model.parameters() if weight.grad is not None]


def of_lowrank(folder: str, tokens, dtype: str) -> list[np.ndarray]:
    base = read_base(pathlib.Path(folder, "base"))
    factors, lora, _ = read_peft(pathlib.Path(folder, "adapter"), MODEL.layers)
    model = Decoder(base.config, lora, jnp.dtype(dtype), jnp.dtype(dtype))
    shapes, _ = decoder.abstract(model)
    variables = {"params": load_params(base, shapes["params"]), "lora": jax.tree.map(jnp.asarray, factors)}
    trainable, frozen = partition.split(variables, partition.trainable_mask(variables, "lora"))
    inputs = tokens[:, :-1].astype(np.int32)
    batch = Batch(
        inputs=inputs,
        targets=tokens[:, 1:].astype(np.int32),
        positions=np.tile(np.arange(inputs.shape[1], dtype=np.int32), (ROWS, 1)),
        segment_ids=np.ones_like(inputs),
        loss_mask=np.ones(inputs.shape, bool),
    )
    found = jax.jit(jax.grad(lambda trainable, batch: loss_sum(model, trainable, frozen, batch)))(trainable, batch)
    return [layer for leaf in jax.tree.leaves(found) for layer in np.asarray(leaf) / inputs.size]


def errors(found: list[np.ndarray], exact: list[np.ndarray]) -> list[float]:
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, exact, strict=True)]


def main(_):
    jax.config.update("jax_platforms", "cpu")
    transformers.logging.disable_progress_bar()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    table = {"lowrank": [], "PEFT, adapter in float32": [], "PEFT, adapter in bfloat16": []}
    for seed in range(FLAGS.seeds):
        with tempfile.TemporaryDirectory() as folder:
            write(folder, seed)
            tokens = np.random.default_rng(seed).integers(0, MODEL.vocab, (ROWS, LENGTH))
            exact = of_peft(folder, tokens, torch.float32, True)
            for name, adapter_in_float32 in (("PEFT, adapter in float32", True), ("PEFT, adapter in bfloat16", False)):
                table[name].append(errors(of_peft(folder, tokens, torch.bfloat16, adapter_in_float32), exact))
            exact = of_lowrank(folder, tokens, "float32")
            table["lowrank"].append(errors(of_lowrank(folder, tokens, "bfloat16"), exact))
    print("| computed in bfloat16 by | error of a gradient, mean | by seed, least to most | largest |")
    print("| --- | --- | --- | --- |")
    for name, found in table.items():
        means = [statistics.mean(one) for one in found]
        cells = [name, f"{statistics.mean(means):.2%}", f"{min(means):.2%} to {max(means):.2%}", f"{np.max(found):.2%}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    app.run(main)
