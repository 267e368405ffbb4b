"""`LoraConfig`: the settings of an adapter. Imported without JAX, as all that `lowrank.config` holds."""

import dataclasses
import math

from lowrank.families.config import ATTENTION, MLP

TARGETS = ATTENTION + MLP


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


def _broadcast(values: tuple, layers: int) -> tuple:
    return values * layers if len(values) == 1 else values
