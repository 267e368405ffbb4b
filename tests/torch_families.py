"""Tiny random models of every family, made by `transformers`, and how far the decoder's logits are from theirs."""

import functools

import jax
import numpy as np
import pytest

from lowrank.model import decoder
from lowrank.model.attention import empty_cache
from lowrank.model.decoder import Decoder
from lowrank.model.products import dot
from lowrank.weights.base import read_base
from lowrank.weights.load import load_params

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
# Name -> (model_type, fields). Windows are smaller than any sequence here, and kv heads go over all, some and one.
CASES = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama, llama3 rotary": (
        "llama",
        {
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_theta": 100.0, "original_max_position_embeddings": 16, **LLAMA3},
        },
    ),
    "llama, biases, tied": (
        "llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral, own head_dim": ("mistral", {"num_key_value_heads": 4, "sliding_window": None, "head_dim": 16}),
    "mistral, window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 7}),
    "mistral, window, tied": (
        "mistral",
        {"num_key_value_heads": 1, "sliding_window": 2, "tie_word_embeddings": True},
    ),
    "qwen2, window off": ("qwen2", {"num_key_value_heads": 4, "sliding_window": 5, "use_sliding_window": False}),
    "qwen2, upper layers windowed, tied": (
        "qwen2",
        {
            "num_key_value_heads": 2,
            "sliding_window": 6,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2, layer_types": (
        "qwen2",
        {
            "num_key_value_heads": 1,
            "sliding_window": 4,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3, tied": ("qwen3", {"num_key_value_heads": 4, "head_dim": 6, "tie_word_embeddings": True}),
    "qwen3, own head_dim": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, biases, upper layer windowed": (
        "qwen3",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "attention_bias": True,
            "sliding_window": 5,
            "use_sliding_window": True,
            "max_window_layers": 2,
        },
    ),
}
PACKED = ((20, 5, 13), (7, 30))  # lengths of the segments of two rows of 40, the rest is padding
PROMPTS, NEW = (9, 14), 12  # tokens of the prompts that are generated from together, and how many come


def make(case: str, seed: int):
    """A model of transformers with every parameter random: zero biases and norms of one hide mistakes."""
    family, fields = CASES[case]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **(SIZE | {"bos_token_id": None, "eos_token_id": None} | fields))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.3 + (1.0 if "norm" in name else 0.0))
    return model


def load(folder):
    """The folder's (decoder, variables), in float32."""
    base = read_base(folder)
    model = Decoder(base.config)
    shapes, _ = decoder.abstract(model)
    return model, {"params": load_params(base, shapes["params"])}


def logits(theirs, ids) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.tensor(np.atleast_2d(ids))).logits.numpy()


def difference(found, expected) -> float:
    """The largest one, relative to the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, ids, positions, segments, cache=None, slot=0, key_segments=None):
    hidden, head, cache = model.apply(variables, ids, positions, segments, cache, slot, key_segments)
    return dot(hidden, head), cache


def plain(theirs, model, variables) -> float:
    ids = np.random.default_rng(0).integers(0, 40, (2, 40))
    found, _ = apply(model, variables, ids, np.broadcast_to(np.arange(40), ids.shape), np.ones_like(ids))
    return difference(found, logits(theirs, ids))


def packed(theirs, model, variables) -> float:
    """Several segments in a row, against each segment alone."""
    ids = np.random.default_rng(1).integers(0, 40, (2, 40))
    positions, segments = np.zeros_like(ids), np.zeros_like(ids)
    spans = []
    for row, lengths in enumerate(PACKED):
        for segment, length in enumerate(lengths, 1):
            span = slice(sum(lengths[: segment - 1]), sum(lengths[:segment]))
            positions[row, span], segments[row, span] = np.arange(length), segment
            spans.append((row, span))
    found, _ = apply(model, variables, ids, positions, segments)
    return max(difference(found[row, span], logits(theirs, ids[row, span])[0]) for row, span in spans)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, 40, length).tolist() for length in PROMPTS]


def generated(theirs) -> tuple[np.ndarray, np.ndarray]:
    """What transformers says to each prompt alone: ids [prompts, NEW] and logits [prompts, NEW, vocab]."""
    ids, steps = [], []
    for prompt in prompts():
        out = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        ids.append(out.sequences[0, len(prompt) :].numpy())
        steps.append(torch.stack(out.logits)[:, 0].numpy())
    return np.stack(ids), np.stack(steps)


def cached(theirs, model, variables) -> float:
    """Prompts of unequal length, padded on the left, then token by token through the cache; transformers' own tokens
    are fed, so that every step can be compared."""
    tokens, expected = generated(theirs)
    width = max(PROMPTS)
    ids, segments = np.zeros((len(PROMPTS), width), np.int32), np.zeros((len(PROMPTS), width + NEW), np.int32)
    for row, prompt in enumerate(prompts()):
        ids[row, width - len(prompt) :], segments[row, width - len(prompt) :] = prompt, 1
    pads = width - np.array(PROMPTS)[:, None]
    empty = empty_cache(model.config, len(PROMPTS), width + NEW, model.dtype)
    positions = np.maximum(np.arange(width) - pads, 0)
    found, cache = apply(model, variables, ids, positions, segments[:, :width], empty, 0, segments)
    steps = [found[:, -1]]
    for new in range(NEW - 1):
        at = (tokens[:, new : new + 1], width + new - pads, np.ones_like(pads))
        found, cache = apply(model, variables, *at, cache, width + new, segments)
        steps.append(found[:, 0])
    return difference(np.stack(steps, axis=1), expected)
