"""Read Hugging Face folders: find the files of weights, and the tensors in them.

Where there is an index, the files must hold exactly the tensors that it names.
"""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lowrank.errors import UserError
from lowrank.families.tensor_names import group_layers, is_ignored
from lowrank.files import paths
from lowrank.weights.remote_file import RemoteFile, open_tensor_file
from lowrank.weights.tensor_file import Tensor, TensorFile
from lowrank.weights.torch_file import open_torch_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SINGLE_BIN, INDEX_BIN = "pytorch_model.bin", "pytorch_model.bin.index.json"
OTHER_FORMATS = (".bin", ".pth", ".pt", ".gguf", ".safetensors")
HEADER_BYTES = 100_000_000  # the library's limit
DTYPE_OF_CODE = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def open_folder(folder: paths.Path) -> dict[str, Tensor]:
    """Every tensor of the folder by name, reading only headers. With both kinds of files, safetensors are read."""
    files, promised = _files(folder)
    found, problems = {}, list[str]()
    places: dict[str, list[str]] = {}
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
    lost = sorted(
        name for name, file in promised.items() if name not in found and file in opened and not is_ignored(name)
    )
    if lost:
        problems.append(f"the index names what no file holds: {group_layers(lost)}")
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}; fetch the folder again")
    return found


def has_weights(folder: paths.Path) -> bool:
    """Whether the folder has files of weights under Hugging Face's names."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX, SINGLE_BIN, INDEX_BIN))


def _files(folder: paths.Path) -> tuple[list[paths.Path], dict[str, str]]:
    """The folder's files of weights, and the index: tensor's name -> file's name (empty without one)."""
    kinds = [(folder / single, folder / index) for single, index in ((SINGLE, INDEX), (SINGLE_BIN, INDEX_BIN))]
    single, index = next((kind for kind in kinds if any(file.is_file() for file in kind)), kinds[0])
    if single.is_file() and index.is_file():
        raise UserError(f"{folder}: has both {single.name} and {index.name}; remove the one that is not the model")
    if single.is_file():
        return [single], {}
    if not index.is_file():
        others = sorted(file.name for file in folder.iterdir() if file.suffix in OTHER_FORMATS)
        found = f" (found {', '.join(others)}, which is not supported)" if others else ""
        wanted = f"{SINGLE}, {SINGLE_BIN} or an index of several files"
        raise UserError(f"{folder}: has no weights: no {wanted}{found}; give the folder of a base")
    try:
        promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(promised.values()))
        outside = [name for name in names if pathlib.PurePath(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index}: holds no weight_map from tensors to files; fetch it again") from None
    if outside:
        raise UserError(f"{index}: names a file outside its folder; fetch it again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} missing, {index.name} names them; fetch them")
    return [folder / name for name in names], promised


def open_file(path: paths.Path, problems: list[str]) -> dict[str, Tensor]:
    """Every tensor of a safetensors or PyTorch file by name; what is wrong with the file joins `problems`."""
    if path.suffix != ".safetensors":
        return open_torch_file(path, problems)
    try:
        file = open_tensor_file(path)
        with _local(file) as place, safe_open(place, framework="numpy"):
            pass  # `safe_open` checks the header against the file's length
    except (SafetensorError, OSError) as error:
        problems.append(f"{path.name} cannot be read ({error}), it is truncated or corrupt")
        return {}
    length = int.from_bytes(file.held(0, 8), "little")
    header = json.loads(bytes(file.held(8, 8 + length)))
    header.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    others: dict[str, list[str]] = {}
    for name, entry in header.items():
        if entry["dtype"] in DTYPE_OF_CODE:
            offset = 8 + length + entry["data_offsets"][0]
            tensors[name] = file.tensor(offset, tuple(entry["shape"]), DTYPE_OF_CODE[entry["dtype"]])
        elif not is_ignored(name):
            others.setdefault(entry["dtype"], []).append(name)
    for dtype, names in others.items():
        problems.append(f"{group_layers(names)} is held in {dtype}, supported are {', '.join(DTYPE_OF_CODE)}")
    return tensors


@contextlib.contextmanager
def _local(file: TensorFile) -> Iterator[os.PathLike | str]:
    """A local file of the same header and length: the file itself, or for one in a bucket a sparse copy."""
    if not isinstance(file, RemoteFile):
        yield file.path
        return
    length = int.from_bytes(file.held(0, 8), "little")
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as sparse:
        sparse.write(file.held(0, 8 + min(length, HEADER_BYTES)))
        sparse.truncate(file.size)
        sparse.flush()
        yield sparse.name
