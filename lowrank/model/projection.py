"""TODO model.projection"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank.adapters.lora import LayerScalars, LoraConfig, init_lora_a
from lowrank.model.products import dot, kept


class Projection(nn.Module):
    """x [..., in] -> [..., features] in `dtype`; `lora` is None where the projection carries no adapter.

    Named as its target. `own` is what this layer's adapter has for itself, None where all layers are alike.
    """

    features: int
    axes: tuple[str, str]  # logical axes of the kernel
    biased: bool
    lora: LoraConfig | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    init_gain: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, own: LayerScalars | None, deterministic: bool) -> jax.Array:
        shape = (x.shape[-1], self.features)
        # 1 / sqrt(in), not a fixed 0.02: that suits an embed of 2,500; at 128 it slowed pretraining down.
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_gain / math.sqrt(x.shape[-1])), self.axes)
        kernel = self.param("kernel", init, shape, self.param_dtype)
        y = dot(x, kernel)
        if self.biased:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            y = y + self.param("bias", init, shape[1:], self.param_dtype).astype(jnp.float32)
        if self.lora is not None:
            scale = self.lora.scale if own is None else own.scale
            y = y + self.delta(x, scale, own, deterministic)
        return kept(y.astype(self.dtype))

    def delta(self, x: jax.Array, scale, own: LayerScalars | None, deterministic: bool) -> jax.Array:
        """(scale · x A) B, float32 [..., features]. The factors are float32; they are rounded to `dtype` to be multiplied."""
        width = self.lora.width(self.name)

        def init_a(*args):
            # Zero beyond this layer's rank. There lora_b is zero too, so neither has a gradient and both stay zero.
            lora_a = init_lora_a(*args)
            return lora_a if own is None else jnp.where(jnp.arange(width) < own.rank, lora_a, 0)

        lora_a = self.factor("lora_a", init_a, (x.shape[-1], width), (self.axes[0], "rank"))
        lora_b = self.factor("lora_b", nn.initializers.zeros, (width, self.features), ("rank", self.axes[1]))
        if self.lora.dropout > 0 and not deterministic:
            share = 1 - self.lora.dropout if own is None or own.keep_prob is None else own.keep_prob
            chosen = jax.random.bernoulli(self.make_rng("dropout"), share, x.shape)
            x = jnp.where(chosen, x.astype(jnp.float32) / share, 0).astype(x.dtype)
        return dot(kept((scale * dot(x, lora_a)).astype(self.dtype)), lora_b)

    def factor(self, name, init, shape, axes) -> jax.Array:
        # Its own stream of random numbers, so that the base's initial weights do not depend on the adapter.
        make = nn.with_logical_partitioning(init, axes)
        return self.variable("lora", name, lambda: make(self.make_rng("lora"), shape, jnp.float32)).value


def project(layer: nn.Module, name: str, axes: tuple[str, str], x, own: dict, deterministic: bool, init_gain=1.0):
    """Apply `layer`'s projection `name` to x [..., in] -> [..., features], with an adapter if `name` is a target.

    To be called in `layer`'s compact method; `layer` has `config`, `lora` (LoraConfig or None), `dtype` and
    `param_dtype`. `own` is what this layer has for itself alone (see `decoder.own_of_layers`).
    """
    features = layer.config.projections()[name][1]
    lora = layer.lora if layer.lora is not None and name in layer.lora.targets else None
    parts = (features, axes, name in layer.config.biased, lora, layer.dtype, layer.param_dtype, init_gain)
    return Projection(*parts, name=name)(x, own.get(name), deterministic)
