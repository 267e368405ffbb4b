"""The updates of an adapter, measured against their kernels, and the directions that it shares with a second adapter.

The questions of section 7 of the LoRA paper (Hu et al., 2021); the linear algebra is in `subspaces.py`.
"""

from typing import NamedTuple

import jax
import numpy as np

from lowrank.adapters.config import TARGETS
from lowrank.analysis import subspaces
from lowrank.errors import UserError
from lowrank.files import paths
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.runs import workdir
from lowrank.runs.adapter import read_adapter, split_step
from lowrank.weights.base import Base, read_base


class Module(NamedTuple):
    """The adapter of one projection in one layer. ΔW [in, out] is its update, W its kernel."""

    layer: int
    projection: str
    rank: int
    lora_a: np.ndarray  # [in, rank]
    update: subspaces.Update  # ΔW, decomposed
    norms: subspaces.Amplification  # of ΔW and W

    @property
    def effective_rank(self) -> float:
        return subspaces.effective_rank(self.update.values)

    @property
    def relative_norm(self) -> float:
        """‖ΔW‖ / ‖W‖."""
        return self.norms.update / self.norms.base


Modules = dict[str, list[Module]]  # by projection, in the order of layers


class Analysis(NamedTuple):
    adapter: paths.Path
    other: paths.Path | None
    modules: Modules  # of `adapter`
    # (projection, "lora_a" or "update") -> layer -> φ(i, j), float64 [rank, the other's rank]: directions shared with `other`
    similarities: dict[tuple[str, str], dict[int, np.ndarray]]
    common_seed: int | None  # of both runs: where their ranks are equal, they began with the same lora_a


def analyze(adapter, other=None, base=None, step: int | str | None = None) -> Analysis:
    """Measure an adapter (a workdir, a PEFT folder, or a name on the hub), and compare its directions with those of `other`
    over the same base.

    `base`: None is the one that the adapter's run names. `step`: which checkpoint of the workdir `adapter`: a number, "best"
    or "last" (as None); `other` may say its own as DIR@STEP. Raises UserError.
    """
    asked = [split_step(adapter, step)] + ([split_step(other)] if other else [])
    folders = [folder for folder, _ in asked]
    if not base and not (folders[0] / "adapter_config.json").is_file():
        base = workdir.read_config(read_adapter(*asked[0]).folder).base
    if not base:
        raise UserError(f"base is missing: {folders[0]} is not the workdir of a run, which would name its base")
    source = read_base(base)
    modules, *others = [measure(folder, source, own) for folder, own in asked]
    similarities = compare(modules, others[0]) if others else {}
    if others and not similarities:
        raise UserError(f"{adapter} and {other} have no projection of any layer in common: nothing to compare")
    seeds = [workdir.read_config(folder).seed for folder in folders if (folder / "config.json").is_file()]
    common = seeds[0] if len(seeds) == 2 and seeds[0] == seeds[1] else None
    return Analysis(folders[0], folders[1] if others else None, modules, similarities, common)


def measure(folder: paths.Path, base: Base, step: int | str | None = None) -> Modules:
    """Every projection of every layer that carries an adapter."""
    adapter, layers = read_adapter(folder, step, base), base.config.layers
    if adapter.lora is None:
        raise UserError(f"{folder} is a full fine-tuning: there are no factors to analyse; give an adapter")
    if adapter.base not in (None, base.fingerprint):
        raise UserError(
            f"{folder} was trained over other weights than those in {base.folder}; give its own base, and to compare two "
            "adapters both of the same one"
        )
    shapes, _ = decoder.abstract(Decoder(base.config, adapter.lora))
    lora = jax.device_get(adapter.restore({"lora": shapes["lora"]})["lora"])["layers"]
    modules: Modules = {}
    for target in (target for target in TARGETS if target in adapter.lora.targets):
        block = next(block for block in lora if target in lora[block])
        factors, kernels = lora[block][target], base.params["layers"][block][target]["kernel"]
        table = zip(adapter.lora.layer_ranks(target, layers), adapter.lora.layer_scales(target, layers), strict=True)
        for layer, (rank, scale) in enumerate(table):
            if rank:
                lora_a, lora_b = factors["lora_a"][layer][:, :rank], factors["lora_b"][layer][:rank]  # without padding
                update = subspaces.decompose(lora_a, lora_b, scale)
                norms = subspaces.amplification(np.asarray(kernels[layer], np.float32), update, rank)
                modules.setdefault(target, []).append(Module(layer, target, rank, lora_a, update, norms))
    zero = [f"{m.projection} in layer {m.layer}" for of in modules.values() for m in of if not m.norms.update]
    if zero:
        raise UserError(f"{folder}: the update of {', '.join(zero)} is zero: it was not trained yet; train it first")
    return modules


def compare(modules: Modules, others: Modules) -> dict[tuple[str, str], dict[int, np.ndarray]]:
    """`Analysis.similarities`: of the input directions of lora_a, and of those of the whole update."""
    similarities: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for target in modules:
        by_layer = {other.layer: other for other in others.get(target, ())}
        for one in (one for one in modules[target] if one.layer in by_layer):
            other = by_layer[one.layer]
            factors = (subspaces.input_directions(module.lora_a) for module in (one, other))
            similarities.setdefault((target, "lora_a"), {})[one.layer] = subspaces.similarity(*factors)
            whole = subspaces.similarity(one.update.left, other.update.left)
            similarities.setdefault((target, "update"), {})[one.layer] = whole
    return similarities
