"""A projection with its adapter: y = x W + scale · (x A) B  (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

The kernel W lives in the collection `params`, the factors in `lora`, under the same module path. So the partition
into base and adapter is a fact of the tree's structure, and no name is ever matched to find an adapter.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank.families.config import ATTENTION, MLP, ModelConfig

TARGETS = ATTENTION + MLP


class LayerScalars(NamedTuple):
    """What the adapter of one projection has for itself in each layer: every leaf leads with `layers` until the scan over
    layers hands it out. Arrays, so that the members of a sweep can share one program."""

    scale: jax.Array  # float32
    rank: jax.Array  # int32
    keep_prob: jax.Array | None = None  # float32, 1 - dropout; None: as the LoraConfig says


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

    def layer_ranks(self, target: str, layers: int) -> tuple[int, ...]:
        return _spread(dict(self.ranks).get(target, (self.rank,)), layers)

    def layer_alphas(self, target: str, layers: int) -> tuple[float, ...]:
        return _spread(dict(self.alphas).get(target, (self.alpha,)), layers)

    def layer_scales(self, target: str, layers: int) -> tuple[float, ...]:
        ranks, alphas = self.layer_ranks(target, layers), self.layer_alphas(target, layers)
        return tuple(self._scale(rank, alpha) for rank, alpha in zip(ranks, alphas, strict=True))

    def layer_scalars(self, layers: int) -> dict[str, LayerScalars]:
        """Of every target, what its layers have for themselves."""
        return {
            target: LayerScalars(
                jnp.asarray(self.layer_scales(target, layers), jnp.float32),
                jnp.asarray(self.layer_ranks(target, layers), jnp.int32),
            )
            for target in self.targets
        }


def padding_size(lora: LoraConfig, config: ModelConfig) -> int:
    """Elements of an uneven adapter's factors that are zero and stay zero."""
    total = 0
    for target in lora.targets:
        inputs, outputs = config.projections()[target]
        total += sum(lora.width(target) - rank for rank in lora.layer_ranks(target, config.layers)) * (inputs + outputs)
    return total


def _spread(values: tuple, layers: int) -> tuple:
    return values * layers if len(values) == 1 else values


def init_lora_a(key, shape, dtype):
    """Uniform in ±1/sqrt(in), as PEFT initialises it (Kaiming uniform with a = sqrt(5))."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)
