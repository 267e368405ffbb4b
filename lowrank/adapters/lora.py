"""LoRA: y = x W + scale · (x A) B  (Hu et al., 2021, https://arxiv.org/abs/2106.09685). Scales, initial values.

`model.projection` applies it. W is a leaf of the collection `params`, A and B (`lora_a`, `lora_b`) are leaves of the
collection `lora` under the same module path: the tree's structure separates base and adapter, no name is matched.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank.adapters.config import LoraConfig
from lowrank.families.config import ModelConfig


class LayerScalars(NamedTuple):
    """Per-layer scalars of one projection's adapter: [layers] outside the scan over layers, scalar inside.

    They are arrays and not constants so that the members of a sweep share one compiled program.
    """

    scale: jax.Array  # float32
    rank: jax.Array  # int32
    keep_prob: jax.Array | None = None  # float32, 1 - dropout; None: as in the LoraConfig


def layer_scalars(lora: LoraConfig, layers: int) -> dict[str, LayerScalars]:
    """The LayerScalars of each target, [layers]."""
    return {
        target: LayerScalars(
            jnp.asarray(lora.layer_scales(target, layers), jnp.float32),
            jnp.asarray(lora.layer_ranks(target, layers), jnp.int32),
        )
        for target in lora.targets
    }


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
