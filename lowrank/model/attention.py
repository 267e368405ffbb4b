"""Grouped-query attention with rotary positions, for packed rows and for cached generation alike.

A query attends to a key if the key's slot is not later and both have the same segment id. Slots are places in the row
(or in the cache); positions are what the rotary angles are computed from. This one rule covers causality, the isolation
of packed examples, left-padded prompts, and the cache's slots that are not written yet. Sliding windows count slots too:
in all of these, the tokens of a segment lie side by side.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapters.config import LoraConfig
from lowrank.adapters.lora import LayerScalars
from lowrank.families.config import ModelConfig
from lowrank.model.cpu import from_bits, to_bits
from lowrank.model.kernels import AttentionMask, attend
from lowrank.model.projection import Projection
from lowrank.parallel.mesh import constrain

Cache = tuple[jax.Array, jax.Array]  # bits of keys and values, each [layers, B, K, S, H]
CosSin = tuple[jax.Array, jax.Array]  # each float32 [B, T, 1, H/2]


class LayerInputs(NamedTuple):
    """What differs between layers beside their weights: [layers] outside the scan over layers, scalars inside.

    Without arrays for uniform layers in training; the program then has no trace of it.
    """

    adapters: dict[str, LayerScalars]  # by target; empty if one scale and rank fit all layers
    window: jax.Array | None = None  # int32, tokens that a query sees; 0: all
    cache_index: jax.Array | None = None  # int32, the layer's place in the cache


def empty_cache(config: ModelConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    shape = (config.layers, rows, config.kv_heads, slots, config.head_dim)
    return to_bits(jnp.zeros(shape, dtype)), to_bits(jnp.zeros(shape, dtype))


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """float32 [head_dim / 2], radians per position; Llama 3.1's scaling as in its reference code."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Wavelengths beyond original_length / low_freq_factor are stretched by `factor`, those below
    # original_length / high_freq_factor are kept, and the band between is interpolated.
    cycles = scaling.original_length * frequencies / np.float32(2 * math.pi)
    kept = (cycles - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0, 1).astype(np.float32)
    return (1 - kept) * frequencies / np.float32(scaling.factor) + kept * frequencies


def rotary_cos_sin(config: ModelConfig, positions: jax.Array) -> CosSin:
    """Cosines and sines of the rotary angles of int32 positions [B, T]."""
    angles = positions.astype(jnp.float32)[..., None, None] * rotary_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Apply rotary positions to x [B, T, heads, H]; (i, i + H/2) are a pair, as in HF files."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """x [..., size of `axis`] over its root mean square, times `scale`; computed in float32."""

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
    """x [B, T, D] -> ([B, T, D], cache). With a cache, this call's keys and values are first written at `layer.cache_index`
    and `slot`: in place, where a scan carries the cache of all layers."""

    config: ModelConfig
    lora: LoraConfig | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    backend: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: Cache | None,
        slot: jax.Array | int,  # the cache's slot of the first token
        rotary: CosSin,
        mask: AttentionMask,
        layer: LayerInputs,
        deterministic: bool,
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        parts = (c, self.lora, self.dtype, self.param_dtype)

        def project_heads(name, heads, axis):
            y = Projection(*parts, ("embed", axis), name=name)(x, layer.adapters, deterministic)
            return constrain(y.reshape(*x.shape[:2], heads, c.head_dim), "batch", "length", axis, "head_dim")

        q = project_heads("q_proj", c.heads, "heads")
        k = project_heads("k_proj", c.kv_heads, "kv_heads")
        v = project_heads("v_proj", c.kv_heads, "kv_heads")
        if c.qk_norm:  # one scale vector for all heads
            q = RMSNorm(c.norm_eps, self.param_dtype, "head_dim", name="q_norm")(q)
            k = RMSNorm(c.norm_eps, self.param_dtype, "head_dim", name="k_norm")(k)
        scale = 1 / math.sqrt(c.head_dim)
        with jax.named_scope("rotary"):  # the names are read by planning/cycles.py
            q, k = rotate(q, *(part * scale for part in rotary)), rotate(k, *rotary)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if cache is not None:
            at = (layer.cache_index, 0, 0, slot, 0)
            keys, values = (
                jax.lax.dynamic_update_slice(held, to_bits(new)[None], at)
                for held, new in zip(cache, (k, v), strict=True)
            )
            cache = keys, values
            k, v = (
                from_bits(jax.lax.dynamic_index_in_dim(held, layer.cache_index, keepdims=False), self.dtype)
                for held in cache
            )
        with jax.named_scope("attend"):
            y = attend(self.backend, q, k, v, mask, slot, layer.window, c.windows)
        y = y.reshape(*x.shape[:2], c.heads * c.head_dim)
        gain = 1 / math.sqrt(2 * c.layers)  # so that the sum of all blocks starts with a variance of about 1
        return Projection(*parts, ("heads", "embed"), gain, name="o_proj")(y, layer.adapters, deterministic), cache
