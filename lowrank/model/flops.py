"""How many floating-point operations a training step does, by hand: 2·m·k·n for every matrix product, and nothing else.

The compiler's own count has the body of a scan once, so it cannot be asked. Its one idea here: a step is a handful of
passes over the same products, and what a part costs is its forward pass times how often it is done again:

    base         forward 1, backward 1 (with respect to x; a frozen kernel has no gradient of its own), remat 1
    adapter      forward 1, backward 2, remat 1
    head         forward 1, backward 1; its logits are neither kept nor computed again (training/objective.py)
    attention    forward 1, backward 2, and 1/2 for the scores that are computed again instead of kept, remat 1

"remat" is the mode "full" of it: with "dots" no product is done again. One whose result only leaves the block (down_proj,
its lora_b) is never done again. If the base is trained, every backward pass is 2. Attention is counted as `xla` computes it,
in causal pieces, whatever of them segments and windows hide. Left out: what is no matrix product (norms, softmax, the
optimizer: under 1 %), and that chunks of the head without a trained token are skipped, so the head is an upper bound.
Checked against the traced step in tests.
"""

import dataclasses

from lowrank.adapters.lora import LoraConfig
from lowrank.families.config import ModelConfig
from lowrank.model.kernels import pieces


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of one step, over all devices; every token slot of every row counts, padding too."""

    base_forward: int
    base_backward: int  # without dW where the base is frozen
    adapter: int
    head: int
    attention: int
    recomputation: int  # everything that remat does again

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @property
    def model(self) -> int:
        """Without what is computed again: what a share of the peak (MFU) is a share of."""
        return self.total - self.recomputation

    def needed(self, trained: float) -> float:
        """The same, where so large a share of the tokens is trained: the head meets no others."""
        return self.model - (1 - trained) * self.head


def step_flops(
    config: ModelConfig, lora: LoraConfig | None, rows: int, length: int, remat: str = "none", mode: str = "lora"
) -> Flops:
    """Of a step over `rows` rows of `length` tokens. `lora` is None where there is no adapter."""
    tokens = rows * length
    full = mode == "full"
    kernels = {name: 2 * inputs * outputs for name, (inputs, outputs) in config.projections().items()}
    base = tokens * config.layers * sum(kernels.values())
    factors_a, factors_b = _factors(config, lora)
    adapter = tokens * config.layers * (sum(factors_a.values()) + sum(factors_b.values()))
    head = tokens * 2 * config.embed * config.vocab
    attention = rows * config.layers * 4 * config.heads * config.head_dim * visible_pairs(length)

    again = 0  # "none" and "dots" keep the results of all products
    if remat == "full":
        adapter_again = adapter - tokens * config.layers * factors_b.get("down_proj", 0)
        again = base - tokens * config.layers * kernels["down_proj"] + adapter_again + attention
    return Flops(
        base_forward=base,
        base_backward=base * (2 if full else 1),
        adapter=3 * adapter,
        head=head * (3 if full else 2),
        attention=attention * 3,
        recomputation=again + attention // 2,
    )


def visible_pairs(length: int) -> int:
    """Pairs of query and key that attention's causal pieces compute, in one row (`xla` in model/attend.py)."""
    return sum((end - start) * seen for start, end, seen in pieces(length, length))


def _factors(config: ModelConfig, lora: LoraConfig | None) -> tuple[dict[str, int], dict[str, int]]:
    """Of every target: operations a token of x @ lora_a, and of that @ lora_b, in one layer."""
    if lora is None:
        return {}, {}
    sizes = {target: (*config.projections()[target], lora.width(target)) for target in lora.targets}
    return (
        {target: 2 * inputs * width for target, (inputs, _, width) in sizes.items()},
        {target: 2 * width * outputs for target, (_, outputs, width) in sizes.items()},
    )
