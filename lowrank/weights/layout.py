"""From our parameter paths to Hugging Face's names: one table, which the check, the import and the export all follow.

Torch holds a linear weight as [out, in], our kernels are its transposes; our leaves stack a name's layers.
"""

import collections
import itertools
from collections.abc import Mapping

import numpy as np

from lowrank.errors import UserError
from lowrank.model.architecture import ATTENTION, ModelConfig
from lowrank.weights.tensor_file import Tensor


def layout(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Path in `params` -> (Hugging Face's name, its shape there); `{}` is the layer, over which our leaves stack."""
    c = config
    table = {"embed_tokens/embedding": ("model.embed_tokens.weight", (c.vocab, c.embed))}

    def add(path: str, shape: tuple[int, ...]) -> None:
        module, leaf = path.rsplit("/", 1)
        name = f"model.layers.{{}}.{module.replace('/', '.')}.{'bias' if leaf == 'bias' else 'weight'}"
        table[f"layers/{path}"] = (name, shape)

    add("input_layernorm/scale", (c.embed,))
    for name, (inputs, outputs) in c.projections().items():
        module = f"{'self_attn' if name in ATTENTION else 'mlp'}/{name}"
        add(f"{module}/kernel", (outputs, inputs))
        if name in c.biased:
            add(f"{module}/bias", (outputs,))
    if c.qk_norm:
        add("self_attn/q_norm/scale", (c.head_dim,))
        add("self_attn/k_norm/scale", (c.head_dim,))
    add("post_attention_layernorm/scale", (c.embed,))
    table["norm/scale"] = ("model.norm.weight", (c.embed,))
    if not c.tied_head:
        table["lm_head/kernel"] = ("lm_head.weight", (c.vocab, c.embed))
    return table


def transpose(source: np.ndarray, out: np.ndarray) -> None:
    """Write `source` [m, n] into `out` [n, m], in the dtype of `out`.

    In bands of 64 rows, which stay in the processor's cache, moved apart by a cache line more than they were: of rows
    that lie a power of two apart it holds only a few. 2.4 GB/s on one core in bfloat16; 0.2 with `out[...] = source.T`.
    """
    columns = source.shape[1]
    apart = np.empty((64, columns + 64 // out.dtype.itemsize), out.dtype)
    for start in range(0, len(source), 64):
        band = apart[: len(source) - start, :columns]
        band[...] = source[start : start + 64]
        out[:, start : start + 64] = band.T


def ignored(name: str) -> bool:
    """Old conversions of Llama carry the rotary frequencies, which follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def check(tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """The tensors that `layout` names, all there and in shape; anything missing, odd or left over is one error."""
    wanted = {
        name.format(layer): shape
        for name, shape in layout(config).values()
        for layer in range(config.layers if "{}" in name else 1)
    }
    rest = {name: tensor for name, tensor in tensors.items() if not ignored(name)}
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
        problems.append(f"missing: {grouped(missing)}{hint}")
    if unknown:
        problems.append(f"unknown: {grouped(unknown)}")
    misshapen = sorted(name for name in wanted.keys() & rest.keys() if rest[name].shape != wanted[name])
    shapes = {name: f"{list(rest[name].shape)} instead of {list(wanted[name])}" for name in misshapen}
    problems += [f"misshapen: {grouped(names)} is {shape}" for shape, names in _inverted(shapes).items()]
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


def grouped(names: list[str]) -> str:
    """All the names, with the layers of a name drawn together: `model.layers.{0,1,2}.mlp.up_proj.weight`."""
    groups = collections.defaultdict(list)
    for name in names:
        before, layers, after = name.partition(".layers.")
        number, _, rest = after.partition(".")
        if number.isdigit():
            groups[before + layers, "." + rest].append(number)
        else:
            groups[name, ""].append("")
    return ", ".join(
        before + (numbers[0] if len(numbers) == 1 else f"{{{','.join(sorted(numbers, key=int))}}}") + after
        for (before, after), numbers in groups.items()
    )
