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

from lowrank.adapters.lora import LoraConfig
from lowrank.families.config import ModelConfig
from lowrank.model.cpu import bits, of_bits
from lowrank.model.kernels import AttentionMask, attend
from lowrank.model.projection import project
from lowrank.parallel.mesh import constrain

Cache = tuple[jax.Array, jax.Array]  # bits of keys and values, each [layers, B, K, S, H]


def empty_cache(config: ModelConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    shape = (config.layers, rows, config.kv_heads, slots, config.head_dim)
    return bits(jnp.zeros(shape, dtype)), bits(jnp.zeros(shape, dtype))


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """float32 [head_dim / 2], radians per position; Llama 3.1's scaling as in its reference code."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Wavelengths beyond original_length / low_freq_factor are stretched by `factor`, those below
    # original_length / high_freq_factor are kept, and the band between is a blend.
    cycles = scaling.original_length * frequencies / np.float32(2 * math.pi)
    kept = (cycles - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
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
    backend: str = "xla"

    @nn.compact
    def __call__(self, x, cache: Cache | None, slot, rotation, sees: AttentionMask, own: dict, deterministic: bool):
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
        scale = 1 / math.sqrt(c.head_dim)
        q, k = rotate(q, *(part * scale for part in rotation)), rotate(k, *rotation)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if cache is not None:
            layer = own["layer"]
            cache = tuple(
                jax.lax.dynamic_update_slice(held, bits(new)[None], (layer, 0, 0, slot, 0))
                for held, new in zip(cache, (k, v), strict=True)
            )
            k, v = (of_bits(jax.lax.dynamic_index_in_dim(held, layer, keepdims=False), self.dtype) for held in cache)
        y = attend(self.backend, q, k, v, sees, slot, own.get("window"), c.windows)
        y = y.reshape(*x.shape[:2], c.heads * c.head_dim)
        gain = 1 / math.sqrt(2 * c.layers)  # so that the sum of all blocks starts with a variance of about 1
        return project(self, "o_proj", ("heads", "embed"), y, own, deterministic, gain), cache
