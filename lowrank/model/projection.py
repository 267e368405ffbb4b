"""A linear projection with its optional LoRA adapter: y = x W + bias + scale · (x A) B."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank.adapters.config import LoraConfig
from lowrank.adapters.lora import LayerScalars, init_factor
from lowrank.families.config import ModelConfig
from lowrank.model.products import dot, save_for_backward


class Projection(nn.Module):
    """x [..., in] -> [..., out] in `dtype`, with an adapter if the module's name is a target of `lora`.

    `scalars` are this layer's, by target; empty where scale and rank are the same in all layers.
    """

    config: ModelConfig
    lora: LoraConfig | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    axes: tuple[str, str]  # logical axes of the kernel
    init_gain: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, scalars: dict[str, LayerScalars], deterministic: bool) -> jax.Array:
        name = str(self.name)
        shape = (x.shape[-1], self.config.projections()[name][1])
        # 1 / sqrt(in), not a fixed 0.02, which suits an embed of 2,500: at 128 it slowed pretraining down.
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_gain / math.sqrt(x.shape[-1])), self.axes)
        kernel = self.param("kernel", init, shape, self.param_dtype)
        y = dot(x, kernel)
        if name in self.config.biased:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            y = y + self.param("bias", init, shape[1:], self.param_dtype).astype(jnp.float32)
        if self.lora is not None and name in self.lora.targets:
            y = y + self.delta(x, shape[1], self.lora, scalars.get(name), deterministic)
        return save_for_backward(y.astype(self.dtype))

    def delta(self, x: jax.Array, features: int, lora: LoraConfig, scalars: LayerScalars | None, deterministic: bool):
        """scale · (x A) B, float32 [..., features]. The factors are float32, cast to `dtype` for the products."""
        width = lora.width(str(self.name))

        # Zero beyond this layer's rank, both factors: so neither has a gradient there, and both stay zero.
        def init_a(*args):
            lora_a = init_factor(*args, 1 / math.sqrt(x.shape[-1]))
            return lora_a if scalars is None else jnp.where(jnp.arange(width) < scalars.rank, lora_a, 0)

        def init_b(*args):
            lora_b = init_factor(
                *args, jax.lax.rsqrt(jnp.float32(width if scalars is None else jnp.maximum(scalars.rank, 1)))
            )
            return lora_b if scalars is None else jnp.where(jnp.arange(width)[:, None] < scalars.rank, lora_b, 0)

        zeros, a_zero = nn.initializers.zeros, lora.init == "a_zero"
        lora_a = self.factor("lora_a", zeros if a_zero else init_a, (x.shape[-1], width), (self.axes[0], "rank"))
        lora_b = self.factor("lora_b", init_b if a_zero else zeros, (width, features), ("rank", self.axes[1]))
        if lora.dropout > 0 and not deterministic:
            keep_prob = 1 - lora.dropout if scalars is None or scalars.keep_prob is None else scalars.keep_prob
            keep = jax.random.bernoulli(self.make_rng("dropout"), keep_prob, x.shape)
            x = jnp.where(keep, x.astype(jnp.float32) / keep_prob, 0).astype(x.dtype)
        scale = lora.scale if scalars is None else scalars.scale
        return dot(save_for_backward((scale * dot(x, lora_a)).astype(self.dtype)), lora_b)

    def factor(self, name: str, init, shape: tuple[int, int], axes: tuple[str, str]) -> jax.Array:
        # Its own stream of random numbers, so that the base's initial weights do not depend on the adapter.
        make = nn.with_logical_partitioning(init, axes)
        return self.variable("lora", name, lambda: make(self.make_rng("lora"), shape, jnp.float32)).value
