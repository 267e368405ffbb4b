"""A projection with its adapter: y = x W + scale · (x A) B  (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

The kernel W lives in the collection `params`, the factors in `lora`, under the same module path. So the partition
into base and adapter is a fact of the tree's structure, and no name is ever matched to find an adapter.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank.model.architecture import ATTENTION, MLP, ModelConfig
from lowrank.model.products import dot, kept

TARGETS = ATTENTION + MLP


class Own(NamedTuple):
    """What the adapter of one projection has for itself in each layer: every leaf leads with `layers` until the scan over
    layers hands it out. Arrays, so that the members of a sweep can share one program."""

    scale: jax.Array  # float32
    rank: jax.Array  # int32
    undropped: jax.Array | None = None  # float32, 1 - dropout; None: as the LoraConfig says


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """An adapter's shape. `dropout` is the share of the adapter's inputs that is zeroed while training."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    scaling: str = "standard"  # "standard": alpha / rank; "rslora": alpha / sqrt(rank) (Kalajdzievski, 2023)
    # Where a target's layers have other ranks than `rank`, or other alphas: (target, one for each layer, or one for all).
    # A rank of 0 is a layer without an adapter. A target's factors are as wide as its largest rank, and zero beyond a
    # layer's own.
    ranks: tuple[tuple[str, tuple[int, ...]], ...] = ()
    alphas: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @property
    def scale(self) -> float:
        """Of every projection that `ranks` and `alphas` do not name."""
        return self._scale(self.rank, self.alpha)

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank) if rank else 0.0

    @property
    def uneven(self) -> bool:
        """Whether layers or targets differ in rank or alpha."""
        return bool(self.ranks or self.alphas)

    def width(self, target: str) -> int:
        """The rank axis of the target's factors."""
        return max(dict(self.ranks).get(target, (self.rank,)))

    def ranks_of(self, target: str, layers: int) -> tuple[int, ...]:
        return _spread(dict(self.ranks).get(target, (self.rank,)), layers)

    def alphas_of(self, target: str, layers: int) -> tuple[float, ...]:
        return _spread(dict(self.alphas).get(target, (self.alpha,)), layers)

    def scales_of(self, target: str, layers: int) -> tuple[float, ...]:
        ranks, alphas = self.ranks_of(target, layers), self.alphas_of(target, layers)
        return tuple(self._scale(rank, alpha) for rank, alpha in zip(ranks, alphas, strict=True))

    def of_layers(self, layers: int) -> dict[str, Own]:
        """Of every target, what its layers have for themselves."""
        return {
            target: Own(
                jnp.asarray(self.scales_of(target, layers), jnp.float32),
                jnp.asarray(self.ranks_of(target, layers), jnp.int32),
            )
            for target in self.targets
        }


def padding(lora: LoraConfig, config: ModelConfig) -> int:
    """Elements of an uneven adapter's factors that are zero and stay zero."""
    total = 0
    for target in lora.targets:
        inputs, outputs = config.projections()[target]
        total += sum(lora.width(target) - rank for rank in lora.ranks_of(target, config.layers)) * (inputs + outputs)
    return total


def _spread(values: tuple, layers: int) -> tuple:
    return values * layers if len(values) == 1 else values


def _lora_a_init(key, shape, dtype):
    """Uniform in ±1/sqrt(in), as PEFT initialises it (Kaiming uniform with a = sqrt(5))."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


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
    def __call__(self, x: jax.Array, own: Own | None, deterministic: bool) -> jax.Array:
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

    def delta(self, x: jax.Array, scale, own: Own | None, deterministic: bool) -> jax.Array:
        """(scale · x A) B, float32 [..., features]. The factors are float32; they are rounded to `dtype` to be multiplied."""
        width = self.lora.width(self.name)

        def init_a(*args):
            # Zero beyond this layer's rank. There lora_b is zero too, so neither has a gradient and both stay zero.
            lora_a = _lora_a_init(*args)
            return lora_a if own is None else jnp.where(jnp.arange(width) < own.rank, lora_a, 0)

        lora_a = self.factor("lora_a", init_a, (x.shape[-1], width), (self.axes[0], "rank"))
        lora_b = self.factor("lora_b", nn.initializers.zeros, (width, self.features), ("rank", self.axes[1]))
        if self.lora.dropout > 0 and not deterministic:
            share = 1 - self.lora.dropout if own is None or own.undropped is None else own.undropped
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
