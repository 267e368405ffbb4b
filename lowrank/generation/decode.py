"""Generation with a key-value cache: a prefill over the prompts, then one compiled decode step for each token.

Prompts of unequal length are padded on the left, so that every row writes its next token into the same slot; the padding
has segment 0, which no token attends to. Lengths are rounded up, so that a chat compiles a handful of shapes.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lowrank.errors import UserError
from lowrank.model.attention import empty_cache
from lowrank.model.decoder import Decoder
from lowrank.model.products import dot, dot_tied
from lowrank.parallel.compiling import lazy_jit

ROUND = 64  # prompt slots and cache slots are multiples of this


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature 0 takes the most likely one; top_k 0 and top_p 1 exclude nothing.

    What is drawn depends on the seed and on a row's number, of which the first row's is `first`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    first: int = 0

    def __post_init__(self):
        wrong = {
            f"temperature={self.temperature} must be 0 or more": not 0 <= self.temperature < math.inf,
            f"top_k={self.top_k} must be 0 (off) or more": self.top_k < 0,
            f"top_p={self.top_p} must be above 0 and at most 1": not 0 < self.top_p <= 1,
            f"seed={self.seed} must be 0 or more and below 2**63": not 0 <= self.seed < 2**63,
        }
        if any(wrong.values()):
            raise UserError("; ".join(problem for problem, holds in wrong.items() if holds))


def generate_ids(
    model: Decoder, variables: dict, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling
) -> Iterator[np.ndarray]:
    """Yield the next token of every row, int [B], `max_new_tokens` times; the caller may stop earlier.

    A row's tokens do not depend on the other rows: each row has its own random key, by its number.
    """
    longest = max(len(prompt) for prompt in prompts)
    width = -(-longest // ROUND) * ROUND
    slots = -(-(width + max_new_tokens) // ROUND) * ROUND
    pads = np.asarray([width - len(prompt) for prompt in prompts], np.int32)
    tokens = np.stack([np.pad(prompt, (pad, 0)) for prompt, pad in zip(prompts, pads, strict=True)]).astype(np.int32)
    segments = (np.arange(slots) >= pads[:, None]).astype(np.int32)
    drawing = (jnp.float32(sampling.temperature), jnp.int32(sampling.top_k), jnp.float32(sampling.top_p))
    settings = (*drawing, jnp.int32(sampling.first))
    key = jax.random.key(sampling.seed)
    layouts = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(variables))
    meshes = (layout.mesh for layout in layouts if isinstance(layout, NamedSharding))
    # Replicated, so that every process can read the tokens: the compiler may shard them over the devices otherwise.
    sharding = next((NamedSharding(mesh, PartitionSpec()) for mesh in meshes), None)
    given = (model, sharding, variables, segments, pads, settings)
    token, cache = _prefill(*given, tokens, jax.random.fold_in(key, 0))
    for drawn in range(1, max_new_tokens + 1):
        yield np.asarray(token)
        if drawn < max_new_tokens:
            slot, draw_key = jnp.int32(width + drawn - 1), jax.random.fold_in(key, drawn)
            token, cache = _decode(*given, cache, token, slot, draw_key)


@functools.partial(lazy_jit, static_argnums=(0, 1))
def _prefill(model: Decoder, sharding: NamedSharding | None, variables, segments, pads, settings, tokens, key):
    rows, width = tokens.shape
    empty = empty_cache(model.config, rows, segments.shape[1], model.dtype)
    positions = jnp.maximum(jnp.arange(width)[None, :] - pads[:, None], 0)
    hidden, head, cache = model.apply(variables, tokens, positions, segments[:, :width], empty, 0, segments)
    return _sample(model, hidden[:, -1], head, key, settings, sharding), cache


@functools.partial(lazy_jit, static_argnums=(0, 1), donate_argnums=6)
def _decode(model, sharding, variables, segments, pads, settings, cache, token, slot, key):
    positions = (slot - pads)[:, None]
    row = (token[:, None], positions, jnp.ones_like(positions))
    hidden, head, cache = model.apply(variables, *row, cache, slot, segments)
    return _sample(model, hidden[:, -1], head, key, settings, sharding), cache


def _sample(model: Decoder, last, head, key, settings, sharding: NamedSharding | None) -> jax.Array:
    """last [B, D], head [D, V] -> int32 [B], laid out as `sharding`. Top-k comes first, then the smallest set that holds top_p."""
    temperature, top_k, top_p, first = settings
    logits = dot_tied(last, head.T) if model.config.tied_head else dot(last, head)
    rows, vocab = logits.shape

    def draw(logits):
        logits = logits / temperature
        descending = jnp.sort(logits, axis=-1)[:, ::-1]
        ranks = jnp.arange(vocab)
        descending = jnp.where((top_k == 0) | (ranks < top_k), descending, -jnp.inf)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of all likelier tokens
        kept = jnp.isfinite(descending) & (before < top_p)
        threshold = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(rows))
        return jax.vmap(jax.random.categorical)(keys, jnp.where(logits >= threshold, logits, -jnp.inf))

    chosen = jax.lax.cond(temperature > 0, draw, lambda logits: jnp.argmax(logits, axis=-1), logits)
    chosen = chosen.astype(jnp.int32)
    return chosen if sharding is None else jax.lax.with_sharding_constraint(chosen, sharding)
