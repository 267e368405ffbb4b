"""From our parameter paths to Hugging Face's names: one table, which the check, the import and the export all follow.

Torch holds a linear weight as [out, in], our kernels are its transposes; our leaves stack a name's layers.
"""

import collections
import itertools
from collections.abc import Mapping

from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.families.tensor_names import group_layers, hf_tensors, is_ignored
from lowrank.weights.tensor_file import Tensor


def check(tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """The tensors that `layout` names, all there and in shape; anything missing, odd or left over is one error."""
    wanted = {
        name.format(layer): shape
        for name, shape in hf_tensors(config).values()
        for layer in range(config.layers if "{}" in name else 1)
    }
    rest = {name: tensor for name, tensor in tensors.items() if not is_ignored(name)}
    problems = []
    embedding, head = rest.get("model.embed_tokens.weight"), rest.get("lm_head.weight")
    if config.tied_head and embedding and head:
        if same(embedding, head):
            del rest["lm_head.weight"]  # a copy of the embedding, which some exporters write
        else:
            problems.append("tie_word_embeddings is true, but lm_head.weight is not the embedding")
            wanted["lm_head.weight"] = head.shape
    missing = sorted(wanted.keys() - rest.keys())
    unknown = sorted(rest.keys() - wanted.keys())
    if missing:
        hint = (
            " (where the head is tied, config.json must say tie_word_embeddings: true)"
            if "lm_head.weight" in missing
            else ""
        )
        problems.append(f"missing: {group_layers(missing)}{hint}")
    if unknown:
        problems.append(f"unknown: {group_layers(unknown)}")
    misshapen = sorted(name for name in wanted.keys() & rest.keys() if rest[name].shape != wanted[name])
    shapes = {name: f"{list(rest[name].shape)} instead of {list(wanted[name])}" for name in misshapen}
    problems += [f"misshapen: {group_layers(names)} is {shape}" for shape, names in _inverted(shapes).items()]
    if problems:
        raise UserError(f"{where}: the tensors do not fit the config: {'; '.join(problems)}; fetch the folder again")
    return rest


def same(one: Tensor, other: Tensor) -> bool:
    """Compared in bands of rows, for an embedding of 128k rows is gigabytes; the first row alone, where others differ."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype or len(one.shape) != 2:
        return False
    rows, columns = one.shape
    starts = [0, *range(1, rows, 4096), rows]
    bands = [(slice(*ends), slice(0, columns)) for ends in itertools.pairwise(starts)]
    return all(one.read(band).tobytes() == other.read(band).tobytes() for band in bands)


def _inverted(mapping: dict[str, str]) -> dict[str, list[str]]:
    inverse = collections.defaultdict(list)
    for key, value in mapping.items():
        inverse[value].append(key)
    return inverse
