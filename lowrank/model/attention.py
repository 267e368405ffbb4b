"""Grouped-query attention with rotary positions, for packed rows and for cached generation alike.

Its one idea: a query sees a key if the key's slot is not later and both carry the same segment id. Slots are places
in the row (or in the cache), positions are what the rotary angles count. That one rule is causality, isolation of
packed examples, left padding of prompts, and the not yet written part of a cache. A layer with a window counts its
distances in slots too, because the tokens of one segment lie side by side in all of these.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lowrank.model.architecture import ModelConfig
from lowrank.model.lora import LoraConfig, project
from lowrank.model.products import bits, kept_bits, of_bits, product, turned
from lowrank.parallel.mesh import constrain

PIECES, SMALLEST = (
    8,
    64,
)  # how many pieces a row's queries are cut into at most, and how many queries a piece has at least

Cache = tuple[jax.Array, jax.Array]  # bits of keys and values, each [layers, B, S, K, H]


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """float32 [head_dim / 2], radians per position; Llama 3.1's scaling as in its reference code."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Wavelengths beyond original_length / low_freq_factor are stretched by `factor`, those below
    # original_length / high_freq_factor are kept, and the band between is a blend.
    turns = scaling.original_length * frequencies / np.float32(2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0, 1).astype(np.float32)
    return (1 - kept) * frequencies / np.float32(scaling.factor) + kept * frequencies


def turns(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles that positions [B, T] are rotated by, each float32 [B, T, 1, H/2]."""
    angles = positions.astype(jnp.float32)[..., None, None] * rotary_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the halves of x [B, T, heads, H] by the `turns`; (i, i + H/2) are a pair, as in HF files."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def visible(query_slots: jax.Array, query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """Slots [T], segments [B, T] and [B, S] -> bool [B, T, S]: which query sees which key."""
    causal = query_slots[:, None] >= jnp.arange(key_segments.shape[1])[None, :]
    return causal & (query_segments[:, :, None] == key_segments[:, None, :])


def near(query_slots: jax.Array, key_slots: int, window: jax.Array) -> jax.Array:
    """Slots [T], number of key slots S -> bool [T, S]: which key is among the `window` last ones, the query's own
    included; all are where `window` is 0."""
    distance = query_slots[:, None] - jnp.arange(key_slots)[None, :]
    return (distance < window) | (window == 0)


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B, T, N, H], k and v [B, S, K, H], mask [B, T, S] -> [B, T, N, H]; scores and softmax in float32.

    When a row attends to itself, queries go in causal pieces, each of which sees only the keys up to its own end: half
    the arithmetic, a fraction of the memory. Scores are forgotten and computed again in the backward pass, which is
    written out (FlashAttention's, Dao et al., 2022, https://arxiv.org/abs/2205.14135) because it needs no second softmax.
    """
    return _attend(q, k, v, mask)[0]


def _attend(q, k, v, mask):
    """-> the result; each query's largest score and sum of weights, float32 [B, K, G, T, 1]."""
    queries, keys, values = _by_query_group(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)
    results, tops, totals = [], [], []
    for start, end, seen in pieces(q.shape[1], k.shape[1]):
        scores = _scores(queries[..., start:end, :], keys[:, :, :seen], mask[:, start:end, :seen])
        tops.append(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - tops[-1])
        totals.append(jnp.sum(weights, axis=-1, keepdims=True))
        # The softmax's division comes after the product with the values: H columns to divide instead of S.
        results.append(_batched(weights.astype(q.dtype), values[:, :, :seen], 1) / totals[-1])
    y, top, total = (jnp.concatenate(parts, axis=3) for parts in (results, tops, totals))
    return _by_token(y.astype(q.dtype)), top, total


def _attend_forward(q, k, v, mask):
    y, top, total = (kept_bits(part) for part in _attend(q, k, v, mask))
    return y, (q, k, v, mask, y, top, total)


def _attend_backward(needed, g):
    q, k, v, mask, y, top, total = needed
    queries, keys, values = _by_query_group(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)
    g, y = (_by_query_group(x, k.shape[2]).astype(jnp.float32) for x in (g, y))
    common = jnp.sum(g * y, axis=-1, keepdims=True) / total  # what a softmax takes off the gradients of its scores
    g = (g / total).astype(q.dtype)
    d_q, d_k = [], jnp.zeros((*keys.shape[:2], keys.shape[3], keys.shape[2]), jnp.float32)  # [B, K, H, S]
    d_v = d_k
    for start, end, seen in pieces(q.shape[1], k.shape[1]):
        at, own_keys = (..., slice(start, end), slice(None)), keys[:, :, :seen]
        weights = jnp.exp(_scores(queries[at], own_keys, mask[:, start:end, :seen]) - top[at])
        d_scores = weights * (_batched(g[at], values[:, :, :seen], 2) - common[at]) / math.sqrt(q.shape[-1])
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
        d_q.append(_batched(d_scores, own_keys, 1))
        d_k = d_k.at[..., :seen].add(_over_queries(queries[at], d_scores))
        d_v = d_v.at[..., :seen].add(_over_queries(g[at], weights))
    d_q = _by_token(jnp.concatenate(d_q, axis=3).astype(q.dtype))
    d_k, d_v = (x.transpose(0, 3, 1, 2).astype(q.dtype) for x in (d_k, d_v))
    return d_q, d_k, d_v, None


attend.defvjp(_attend_forward, _attend_backward)


def pieces(length: int, slots: int) -> list[tuple[int, int, int]]:
    """What a piece's queries are (start, end), and how many keys it sees."""
    if length != slots:
        return [(0, length, slots)]
    size = max(SMALLEST, -(-length // PIECES))
    return [(start, min(start + size, length), min(start + size, length)) for start in range(0, length, size)]


def _by_query_group(x, kv_heads):
    """[B, T, N, H] -> [B, K, G, T, H]: batch and kv head lead, so that every product is one plain batch of matrices."""
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1]).transpose(0, 2, 3, 1, 4)


def _by_token(x):
    """The inverse."""
    batch, kv_heads, group, length, head_dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head_dim)


def _scores(queries, keys, mask):
    scores = _batched(queries, keys, 2) / math.sqrt(queries.shape[-1])
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _batched(a, b, axis: int):
    """a [B, K, G, T, n], b [B, K, …] with n along axis 1 or 2 of its matrices -> float32 [B, K, G, T, other]."""
    rows = a.reshape(*a.shape[:2], -1, a.shape[-1])
    return product(rows, b, ((3,), (1 + axis,)), ((0, 1), (0, 1))).reshape(*a.shape[:4], -1)


def _over_queries(a, b):
    """a [B, K, G, T, m], b [B, K, G, T, n] -> float32 [B, K, m, n], summed over the queries. m is the small one."""
    a, b = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (a, b))
    return product(turned(a), b, ((3,), (2,)), ((0, 1), (0, 1)))


class RMSNorm(nn.Module):
    """x [..., size of `axis`] over its root mean square, times `scale`; in float32 between."""

    eps: float
    param_dtype: jnp.dtype
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
    """x [B, T, D] -> ([B, T, D], cache). With a cache, this call's keys and values are written at own["layer"] and `slot`
    first: in place, where a scan carries the cache of all layers."""

    config: ModelConfig
    lora: LoraConfig | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, cache: Cache | None, slot, rotation, mask, own: dict, deterministic: bool):
        c = self.config

        def heads_of(name, heads, axis):
            y = project(self, name, ("embed", axis), x, own, deterministic)
            return constrain(y.reshape(*x.shape[:2], heads, c.head_dim), "batch", "length", axis, "head_dim")

        q = heads_of("q_proj", c.heads, "heads")
        k = heads_of("k_proj", c.kv_heads, "kv_heads")
        v = heads_of("v_proj", c.kv_heads, "kv_heads")
        if c.qk_norm:  # one scale vector for all heads
            q = RMSNorm(c.norm_eps, self.param_dtype, "head_dim", name="q_norm")(q)
            k = RMSNorm(c.norm_eps, self.param_dtype, "head_dim", name="k_norm")(k)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            layer = own["layer"]
            cache = tuple(
                jax.lax.dynamic_update_slice(held, bits(new)[None], (layer, 0, slot, 0, 0))
                for held, new in zip(cache, (k, v), strict=True)
            )
            k, v = (of_bits(jax.lax.dynamic_index_in_dim(held, layer, keepdims=False), self.dtype) for held in cache)
        if "window" in own:
            mask = mask & near(slot + jnp.arange(x.shape[1]), k.shape[1], own["window"])
        y = attend(q, k, v, mask).reshape(*x.shape[:2], c.heads * c.head_dim)
        gain = 1 / math.sqrt(2 * c.layers)  # so that the sum of all blocks starts with a variance of about 1
        return project(self, "o_proj", ("heads", "embed"), y, own, deterministic, gain), cache
