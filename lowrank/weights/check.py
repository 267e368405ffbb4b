"""Check a checkpoint's tensors against its config: names, shapes, and the head where it is tied."""

import collections
import itertools
from collections.abc import Mapping

from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.families.tensor_names import group_layers, hf_tensors, is_ignored
from lowrank.weights.tensor_file import Tensor


def check(tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """The tensors that `layout` names. UserError lists all that are missing, unknown or misshapen."""
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
        untied = " (where the head is tied, config.json must say tie_word_embeddings: true)"
        problems.append(f"missing: {group_layers(missing)}{untied if 'lm_head.weight' in missing else ''}")
    if unknown:
        problems.append(f"unknown: {group_layers(unknown)}")
    misshapen = collections.defaultdict(list)
    for name in sorted(wanted.keys() & rest.keys()):
        if rest[name].shape != wanted[name]:
            misshapen[f"{list(rest[name].shape)} instead of {list(wanted[name])}"].append(name)
    problems += [f"misshapen: {group_layers(names)} is {shape}" for shape, names in misshapen.items()]
    if problems:
        raise UserError(f"{where}: the tensors do not fit the config: {'; '.join(problems)}; fetch the folder again")
    return rest


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices are equal. Compared in bands of rows (an embedding is gigabytes), the first one a single row."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype or len(one.shape) != 2:
        return False
    rows, columns = one.shape
    starts = [0, *range(1, rows, 4096), rows]
    bands = [(slice(*ends), slice(0, columns)) for ends in itertools.pairwise(starts)]
    return all(one.read(band).tobytes() == other.read(band).tobytes() for band in bands)
