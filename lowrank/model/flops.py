"""Floating-point operations of a training step, counted by hand: 2·m·k·n for every matrix product, and nothing else.

The compiler's own count has the body of a scan once, so it cannot be used. A step is a handful of passes over the same
products; a part costs its forward pass times the number of passes:

    base         forward 1, backward 1 (dx alone: a frozen kernel has no gradient), remat 1
    adapter      forward 1, backward 2, remat 1
    head         forward 1, backward 1; its logits are neither saved nor recomputed (training/objectives/cross_entropy.py)
    attention    forward 1, backward 2, and 1/2 for the scores that are recomputed instead of saved, remat 1

"remat" is its mode "full"; with "dots" no product is recomputed. A product whose result only leaves the block (down_proj,
its lora_b) is never recomputed. If the base is trained, every backward pass is 2. Attention is counted as `xla` computes
it, in causal blocks, whatever segments and windows mask. Left out: everything but matrix products (norms, softmax, the
optimizer: under 1 %), and that the head skips chunks without trained tokens, so the head's count is an upper bound.
Tests compare with the traced step.
"""

import dataclasses

from lowrank.adapters.config import LoraConfig
from lowrank.families.config import ModelConfig
from lowrank.model.kernels import causal_blocks


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one step over all devices; every token slot of every row counts, padding too."""

    base_forward: int
    base_backward: int  # without dW if the base is frozen
    adapter: int
    head: int
    attention: int
    recomputation: int  # by remat, and of attention's scores

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @property
    def model(self) -> int:
        """Without recomputation: the numerator of MFU."""
        return self.total - self.recomputation

    def needed(self, trained: float) -> float:
        """`model` if only this share of the tokens is trained: the head is computed for no others."""
        return self.model - (1 - trained) * self.head


def step_flops(
    config: ModelConfig, lora: LoraConfig | None, rows: int, length: int, remat: str = "none", mode: str = "lora"
) -> Flops:
    """FLOPs of a step over `rows` rows of `length` tokens. `lora` is None without an adapter."""
    tokens = rows * length
    full = mode == "full"
    projections = config.projections()
    kernels = {name: 2 * inputs * outputs for name, (inputs, outputs) in projections.items()}
    base = tokens * config.layers * sum(kernels.values())
    # Each target's FLOPs a token in one layer: of x @ lora_a, and of that @ lora_b.
    widths = {} if lora is None else {target: lora.width(target) for target in lora.targets}
    factors_a = {target: 2 * projections[target][0] * width for target, width in widths.items()}
    factors_b = {target: 2 * width * projections[target][1] for target, width in widths.items()}
    adapter = tokens * config.layers * (sum(factors_a.values()) + sum(factors_b.values()))
    head = tokens * 2 * config.embed * config.vocab
    attention = rows * config.layers * 4 * config.heads * config.head_dim * visible_pairs(length)

    recomputed = 0  # "none" and "dots" save the results of all products
    if remat == "full":
        recomputed_adapter = adapter - tokens * config.layers * factors_b.get("down_proj", 0)
        recomputed = base - tokens * config.layers * kernels["down_proj"] + recomputed_adapter + attention
    return Flops(
        base_forward=base,
        base_backward=base * (2 if full else 1),
        adapter=3 * adapter,
        head=head * (3 if full else 2),
        attention=attention * 3,
        recomputation=recomputed + attention // 2,
    )


def visible_pairs(length: int) -> int:
    """Pairs of query and key that `kernels.xla` computes for one row, in causal blocks."""
    return sum((end - start) * keys for start, end, keys in causal_blocks(length, length))
