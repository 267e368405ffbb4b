"""The native base that `lowrank.convert` writes: the leaves of `params`, layer by layer, laid out as in memory.

    lowrank.json                        format, fingerprint, and of each tensor its file, dtype, shape and check sums
    params-00001-of-00003.safetensors   params.layers.3.self_attn.q_proj.kernel [in, out] and so on, 5 GB a file
    config.json, the tokenizer …        as in a Hugging Face folder

Loading transposes nothing, and any slice for any mesh is a few runs of bytes. The fingerprint is that of the
Hugging Face folder with the same weights, so an adapter trained over one works with the other.

Every MB of rows has a CRC-32, which is compared when these rows are read whole: so loading on one device, merging and
converting check everything. Unchecked are rows of which a device reads only some columns, and rows that share their MB
with another device's (units are powers of two of rows: with the usual shapes none do).
"""

import dataclasses
import json
import math
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.families.tensor_names import group_layers, hf_tensors
from lowrank.files import paths
from lowrank.weights import huggingface
from lowrank.weights.fingerprint import fingerprint
from lowrank.weights.tensor_file import Tensor, cut, in_files, rows_within

MANIFEST, FORMAT = "lowrank.json", 1
FILE_BYTES = 5 * 10**9
UNIT_BYTES = 2**20  # per check sum
CODES = {dtype: code for code, dtype in huggingface.DTYPE_OF_CODE.items()}


def names(config: ModelConfig) -> dict[str, str]:
    """Path in `params` -> the name of its tensors in the files, with `{}` for the layer."""
    return {path: "params." + path.replace("layers/", "layers/{}/").replace("/", ".") for path in hf_tensors(config)}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name of every tensor in the files -> its shape, in the order of the files."""
    return {
        name.format(layer): shape[::-1] if path.endswith("kernel") else shape
        for (path, name), (_, shape) in zip(names(config).items(), hf_tensors(config).values(), strict=True)
        for layer in range(config.layers if "{}" in name else 1)
    }


def units(shape: tuple[int, ...], dtype: np.dtype) -> list[slice]:
    """The rows of a tensor that share a check sum."""
    return cut(slice(0, shape[0]), rows_within(UNIT_BYTES, math.prod(shape[1:]) * dtype.itemsize))


def open_folder(folder: paths.Path, config: ModelConfig) -> tuple[dict[str, Tensor], str]:
    """Every tensor by name, checked against config.json and lowrank.json, and the fingerprint of the weights."""
    manifest = _read_manifest(folder / MANIFEST)
    table, found, problems = manifest["tensors"], {}, []
    for file in sorted({entry["file"] for entry in table.values()}):
        if not (folder / file).is_file():
            problems.append(f"{file} is missing")
            continue
        for name, tensor in huggingface.open_file(folder / file, problems).items():
            if table.get(name, {}).get("file") == file:
                found[name] = tensor
            else:
                problems.append(f"{name} is in {file}, but not according to {MANIFEST}")
    if not problems:  # else these would be consequences
        problems = _misfits(table, found, shapes(config))
    if not problems and manifest["config"] != _as_json(config):
        problems = ["config.json is not the one that was written with these weights"]
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}; copy the folder again, or convert again")
    if fingerprint(found) != manifest["samples"]:
        raise UserError(f"{folder}: holds other weights than its {MANIFEST} says; copy it again, or convert again")
    checked = {
        name: _checked(tensor, table[name]["crc32"].split(), f"{folder / table[name]['file']}: {name}")
        for name, tensor in found.items()
    }
    return checked, manifest["fingerprint"]


def _as_json(config: ModelConfig) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _read_manifest(path: paths.Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{path}: has format {manifest['format']!r}, this lowrank reads {FORMAT}; update lowrank")
        if not re.fullmatch("[0-9a-f]{32}", manifest["fingerprint"]):
            raise ValueError(f"{manifest['fingerprint']!r} is no fingerprint")
        manifest["samples"], manifest["config"]
        for entry in manifest["tensors"].values():
            if not re.fullmatch(r"params-\d{5}-of-\d{5}\.safetensors", entry["file"]):
                raise ValueError(f"{entry['file']!r} is no file of weights")
            if not entry["shape"]:
                raise ValueError("a tensor has no axes")
            entry["dtype"], entry["shape"], entry["crc32"].split()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: does not describe a native base ({said}); copy it again") from None
    return manifest


def _misfits(table: dict, found: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    """Where the tensors of the config, of lowrank.json and of the files differ."""
    said = {name: (entry["dtype"], entry["shape"], len(entry["crc32"].split())) for name, entry in table.items()}
    held = {name: (CODES[t.dtype], [*t.shape], len(units(t.shape, t.dtype))) for name, t in found.items()}
    groups = {
        "missing": wanted.keys() - table.keys(),
        "unknown to config.json": table.keys() - wanted.keys(),
        f"in {MANIFEST} but in no file": table.keys() - found.keys(),
        f"of another dtype or shape than {MANIFEST} says": {name for name in held if held[name] != said[name]},
        "of another shape than config.json says": {
            name for name in wanted.keys() & found.keys() if found[name].shape != wanted[name]
        },
    }
    return [f"{problem}: {group_layers(sorted(of))}" for problem, of in groups.items() if of]


def _checked(tensor: Tensor, sums: list[str], where: str) -> Tensor:
    """The same tensor, with its check sums compared where rows are read whole."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        part = tensor.read(index)
        rows, *columns = index
        if all(span == slice(0, size) for span, size in zip(columns, tensor.shape[1:], strict=True)):
            for unit, expected in zip(units(tensor.shape, tensor.dtype), sums, strict=True):
                inside = rows.start <= unit.start and unit.stop <= rows.stop
                if inside and _crc32(part[unit.start - rows.start : unit.stop - rows.start]) != expected:
                    rows_of_unit = f"rows {unit.start} to {unit.stop - 1}"
                    raise UserError(f"{where}: {rows_of_unit} are not what was written; copy or convert it again")
        return part

    return Tensor(tensor.shape, tensor.dtype, read, tensor.expect)


def _crc32(rows: np.ndarray) -> str:
    return f"{zlib.crc32(rows.view(np.uint8)):08x}"


def write(
    folder: pathlib.Path,
    config: ModelConfig,
    dtypes: Mapping[str, np.dtype],
    pieces: Iterable[np.ndarray],
    identity: str,
) -> None:
    """Write the files of tensors and lowrank.json into an empty folder, with one piece in memory at a time.

    `dtypes` is by tensor's name. `pieces` are the tensors in the order of `shapes`, each whole or in runs of rows that
    contain whole units. `identity` is the fingerprint of the weights.
    """
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes(config).items()}
    files = in_files(sizes, FILE_BYTES)
    table: dict[str, dict] = {}
    opened: dict[str, Tensor] = {}
    left = iter(pieces)
    for number, held in enumerate(files, 1):
        path = folder / f"params-{number:05}-of-{len(files):05}.safetensors"
        entries = {name: {"dtype": CODES[dtypes[name]], "shape": shapes(config)[name]} for name in held}
        _write_file(path, entries, left)
        table |= {name: {"file": path.name, **entry} for name, entry in entries.items()}
        opened |= huggingface.open_file(path, [])
    known = {"format": FORMAT, "fingerprint": identity, "config": _as_json(config)}
    manifest = known | {"samples": fingerprint(opened), "tensors": table}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _write_file(path: pathlib.Path, entries: dict[str, dict], pieces: Iterator[np.ndarray]) -> None:
    """Write one safetensors file and each entry's check sums (the library's writer needs a whole file in memory)."""
    header, end = {"__metadata__": dict[str, Any](format="lowrank")}, 0
    for name, entry in entries.items():
        start, end = end, end + math.prod(entry["shape"]) * huggingface.DTYPE_OF_CODE[entry["dtype"]].itemsize
        header[name] = {**entry, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in entries.values():
            rows, sums = units(entry["shape"], huggingface.DTYPE_OF_CODE[entry["dtype"]]), list[str]()
            while len(sums) < len(rows):
                piece = next(pieces)
                file.write(piece.view(np.uint8))
                sums += [_crc32(part) for part in np.split(piece, range(rows[0].stop, len(piece), rows[0].stop))]
            entry["crc32"] = " ".join(sums)
