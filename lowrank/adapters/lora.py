"""LoRA: y = x W + scale · (x A) B  (Hu et al., 2021, https://arxiv.org/abs/2106.09685). Ranks, scales, initial values.

`model.projection` applies it. W is a leaf of the collection `params`, A and B (`lora_a`, `lora_b`) are leaves of the
collection `lora` under the same module path: the tree's structure separates base and adapter, no name is matched.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank.families.config import ATTENTION, MLP, ModelConfig

TARGETS = ATTENTION + MLP


class LayerScalars(NamedTuple):
    """Per-layer scalars of one projection's adapter: [layers] outside the scan over layers, scalar inside.

    They are arrays and not constants so that the members of a sweep share one compiled program.
    """

    scale: jax.Array  # float32
    rank: jax.Array  # int32
    keep_prob: jax.Array | None = None  # float32, 1 - dropout; None: as in the LoraConfig


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """An adapter's shape. `dropout` is the share of the adapter's inputs that is zeroed in training."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    scaling: str = "standard"  # "standard": alpha / rank; "rslora": alpha / sqrt(rank) (Kalajdzievski, 2023)
    init: str = "default"  # which factor begins at zero: "default": B; "a_zero": A (Hayou et al., 2024, Init[B])
    # Targets whose rank or alpha differs from the above: (target, a value for each layer, or one for all layers).
    # Rank 0 is a layer without an adapter. The factors of a target are as wide as its largest rank, and zero beyond a
    # layer's own rank.
    ranks: tuple[tuple[str, tuple[int, ...]], ...] = ()
    alphas: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @property
    def scale(self) -> float:
        """The scale of the targets that `ranks` and `alphas` do not name."""
        return self._scale(self.rank, self.alpha)

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank) if rank else 0.0

    @property
    def uneven(self) -> bool:
        """Whether layers or targets may differ in rank or alpha."""
        return bool(self.ranks or self.alphas)

    def width(self, target: str) -> int:
        """Size of the rank axis of the target's factors."""
        return max(dict(self.ranks).get(target, (self.rank,)))

    def layer_ranks(self, target: str, layers: int) -> tuple[int, ...]:
        return _broadcast(dict(self.ranks).get(target, (self.rank,)), layers)

    def layer_alphas(self, target: str, layers: int) -> tuple[float, ...]:
        return _broadcast(dict(self.alphas).get(target, (self.alpha,)), layers)

    def layer_scales(self, target: str, layers: int) -> tuple[float, ...]:
        ranks, alphas = self.layer_ranks(target, layers), self.layer_alphas(target, layers)
        return tuple(self._scale(rank, alpha) for rank, alpha in zip(ranks, alphas, strict=True))

    def layer_scalars(self, layers: int) -> dict[str, LayerScalars]:
        """The LayerScalars of each target, [layers]."""
        return {
            target: LayerScalars(
                jnp.asarray(self.layer_scales(target, layers), jnp.float32),
                jnp.asarray(self.layer_ranks(target, layers), jnp.int32),
            )
            for target in self.targets
        }


def _broadcast(values: tuple, layers: int) -> tuple:
    return values * layers if len(values) == 1 else values


def padding_size(lora: LoraConfig, config: ModelConfig) -> int:
    """Number of elements beyond their layer's rank in the factors: they are zero and stay zero."""
    return sum(
        (lora.width(target) - rank) * sum(config.projections()[target])
        for target in lora.targets
        for rank in lora.layer_ranks(target, config.layers)
    )


def init_factor(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype, bound: jax.Array | float) -> jax.Array:
    """Uniform in ±bound, which is 1/sqrt(fan-in) as in PEFT (Kaiming uniform with a = sqrt(5)): of lora_a [in, rank] the
    fan-in is `in`; of lora_b [rank, out] it is the rank, as PEFT draws B where `init_lora_weights` is false."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)
