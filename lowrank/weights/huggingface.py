"""Hugging Face folders of safetensors: opening them and checking them against a config.

Its one idea is `layout`: a single table from our parameter paths to Hugging Face's names and shapes, which the check,
the import and the export all follow. Torch holds a linear weight as [out, in], our kernels are its transposes.
Left out: `.bin` and `.pth` files, which are pickles and get readers of their own.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lowrank.errors import UserError
from lowrank.model.architecture import ModelConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_FORMATS = (".bin", ".pth", ".pt", ".gguf", ".safetensors")
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as it lies in a file: known by name and shape, read slice by slice."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]  # a slice within bounds for every axis -> a copy


def layout(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Path in `params` -> (Hugging Face's name, its shape there); `{}` is the layer, over which our leaves stack."""
    c, q, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    table = {"embed_tokens/embedding": ("model.embed_tokens.weight", (c.vocab, c.embed))}
    for module, shape in {
        "input_layernorm/scale": (c.embed,),
        "self_attn/q_proj/kernel": (q, c.embed),
        "self_attn/k_proj/kernel": (kv, c.embed),
        "self_attn/v_proj/kernel": (kv, c.embed),
        "self_attn/o_proj/kernel": (c.embed, q),
        "post_attention_layernorm/scale": (c.embed,),
        "mlp/gate_proj/kernel": (c.mlp, c.embed),
        "mlp/up_proj/kernel": (c.mlp, c.embed),
        "mlp/down_proj/kernel": (c.embed, c.mlp),
    }.items():
        name = module.rpartition("/")[0].replace("/", ".")
        table[f"layers/{module}"] = (f"model.layers.{{}}.{name}.weight", shape)
    table["norm/scale"] = ("model.norm.weight", (c.embed,))
    if not c.tied_head:
        table["lm_head/kernel"] = ("lm_head.weight", (c.vocab, c.embed))
    return table


def transpose(source: np.ndarray, out: np.ndarray) -> None:
    """Write `source` [m, n] into `out` [n, m], in the dtype of `out`.

    In bands of 16 rows, which stay in the processor's cache: 0.9 GB/s on one core, 0.2 with `out[...] = source.T`.
    """
    for start in range(0, len(source), 16):
        out[:, start : start + 16] = source[start : start + 16].T


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
    """Every tensor in the folder's safetensors files by name; reads the files' headers only."""
    files, promised = _files(folder)
    found, places, problems = {}, {}, []
    for file in files:
        for name, tensor in open_file(file, problems).items():
            places.setdefault(name, []).append(file.name)
            found[name] = tensor
    for name, files_with_it in places.items():
        if len(files_with_it) > 1:
            problems.append(f"{name} is in {' and '.join(files_with_it)}")
        elif promised and promised.get(name) != files_with_it[0]:
            problems.append(f"{name} is in {files_with_it[0]}, the index says {promised.get(name)}")
    opened = {file for files_with_it in places.values() for file in files_with_it}
    lost = sorted(name for name, file in promised.items() if name not in found and file in opened)
    if lost:
        problems.append(f"the index names what no file holds: {grouped(lost)}")
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}; fetch the folder again")
    return found


def _files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """The folder's files of weights, and what the index promises: tensor's name -> file's name."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise UserError(f"{folder}: has both {SINGLE} and {INDEX}; remove the one that is not the model")
    if single.is_file():
        return [single], {}
    if not index.is_file():
        others = sorted(file.name for file in folder.iterdir() if file.suffix in OTHER_FORMATS)
        found = f" (found {', '.join(others)}, which is not supported)" if others else ""
        raise UserError(f"{folder}: has neither {SINGLE} nor {INDEX}{found}; give a folder of safetensors")
    try:
        promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(promised.values()))
        outside = [name for name in names if pathlib.PurePath(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: holds no weight_map from tensors to files; fetch it again") from None
    if outside:
        raise UserError(f"{index}: names a file outside its folder; fetch it again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} missing, {INDEX} names them; fetch them")
    return [folder / name for name in names], promised


def open_file(path: pathlib.Path, problems: list[str]) -> dict[str, Tensor]:
    """Every tensor of one safetensors file by name; what is wrong with the file joins `problems`."""
    try:
        handle = safe_open(path, framework="numpy")  # maps the file and checks that its header fits its length
    except (SafetensorError, OSError) as error:
        problems.append(f"{path.name} cannot be read ({error}), it is truncated or corrupt")
        return {}
    tensors = {}
    for name in handle.keys():  # noqa: SIM118 (a handle is no dict)
        part = handle.get_slice(name)
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if dtype in DTYPES:
            tensors[name] = Tensor(shape, DTYPES[dtype], part.__getitem__)
        elif not _ignored(name):
            problems.append(f"{name} is held in {dtype}, supported are {', '.join(DTYPES)}")
    return tensors


def _ignored(name: str) -> bool:
    """Old conversions of Llama carry the rotary frequencies, which follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def check(tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """The tensors that `layout` names, all there and in shape; anything missing, odd or left over is one error."""
    wanted = {
        name.format(layer): shape
        for name, shape in layout(config).values()
        for layer in range(config.layers if "{}" in name else 1)
    }
    rest = {name: tensor for name, tensor in tensors.items() if not _ignored(name)}
    problems = []
    embedding, head = rest.get("model.embed_tokens.weight"), rest.get("lm_head.weight")
    if config.tied_head and embedding and head:
        if _same(embedding, head):
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
        raise UserError(f"{where}: the tensors do not fit config.json: {'; '.join(problems)}; fetch the folder again")
    return rest


def _same(one: Tensor, other: Tensor) -> bool:
    """Compared in bands of rows: an embedding of 128k rows would be gigabytes at once."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    rows, columns = one.shape
    bands = [(slice(start, min(start + 4096, rows)), slice(0, columns)) for start in range(0, rows, 4096)]
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
