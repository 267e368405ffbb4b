"""Read PyTorch's files (`.bin`, `.pth`, `.pt`) without PyTorch and without running code from them.

Such a file is a zip of stored entries: `data.pkl`, a pickle of a dict of tensors, and `data/KEY`, the tensors' bytes.
A pickle is a program. The interpreter here knows the instructions that `torch.save` writes for a dict of tensors and
implements three functions itself: it cannot import, look up or call anything else. Unknown names are refused.

Tensors stay in the mapped file. The zip has a checksum of every entry: it is compared as soon as more of a tensor is read
than a fingerprint samples, for small entries at once. So opening 13 GB reads some megabytes, and no damaged weight is
loaded. Left out: files from before PyTorch 1.6 (2020), and from big-endian machines.
"""

import contextlib
import dataclasses
import io
import math
import pickletools
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from lowrank.errors import UserError
from lowrank.families.config_json import DTYPES
from lowrank.families.tensor_names import is_ignored
from lowrank.files.paths import PathLike
from lowrank.files.paths import path as path_of
from lowrank.weights.remote_file import RemoteFile, open_tensor_file
from lowrank.weights.tensor_file import Index, Tensor, TensorFile

# The dtype of a storage, by its pickled name.
FLOATS = {"Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16, "Double": np.float64}
INTEGERS = {"Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_}
STORAGES = {f"torch.{name}Storage": np.dtype(dtype) for name, dtype in (FLOATS | INTEGERS).items()}
DICT = "collections.OrderedDict"
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
KNOWN = {DICT, TENSOR, PARAMETER, *STORAGES}

# Bytes of one tensor that are read before its entry's checksum is compared. A fingerprint takes 16 samples of up to 2048
# float32, and a row of the embedding shows whether the head is the same matrix.
UNCHECKED = 262_144
BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number of files until 2020

# What this file and the standard library raise for damaged bytes.
DAMAGE = (
    ValueError, TypeError, LookupError, EOFError, OverflowError, NotImplementedError, RuntimeError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip


def open_torch_file(where: PathLike, problems: list[str]) -> dict[str, Tensor]:
    """Every tensor of a file with a dict of them, by name; what is wrong with the file joins `problems`.

    Reading a tensor raises UserError if its bytes do not match their checksum.
    """
    path = path_of(where)
    try:
        entries = _entries(open_tensor_file(path))
        values = _dict_in(entries)
    except Refused as refused:
        problems.append(f"{path.name} {refused}")
        return {}
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror or error})")
        return {}
    except DAMAGE as error:
        problems.append(f"{path.name} cannot be read ({' '.join(str(error).split())}), it is truncated or corrupt")
        return {}
    tensors = {}
    for name, value in values.items():
        if not isinstance(value, View):
            if not is_ignored(name):
                problems.append(f"{path.name}: {name} is {_kind(value)}, not a tensor")
        elif value.storage.dtype.name in DTYPES:
            tensors[name] = _tensor(value)
        elif not is_ignored(name):
            problems.append(f"{name} is held in {value.storage.dtype.name}, supported are {', '.join(DTYPES)}")
    return tensors


class Refused(Exception):
    """The file may be undamaged, but cannot be read; the text continues after the file's name."""


# ------------------------------------------------------------------------------------------------------------- the zip


class Entry:
    """An entry of the zip: where its bytes are in the file, and whether they match their checksum."""

    def __init__(self, file: TensorFile, info: zipfile.ZipInfo):
        self.file, self.name, self.size, self.checksum = file, info.filename, info.file_size, info.CRC
        # The directory gives the offset of an entry's header; only that header gives the padding after it.
        header = bytes(file.held(info.header_offset, info.header_offset + 30))
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"{self.name} is not where the directory says")
        length, extra = struct.unpack("<HH", header[26:])
        name = file.held(info.header_offset + 30, info.header_offset + 30 + length)
        if name != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
            raise ValueError(f"{self.name} has another name in the directory")
        self.offset = info.header_offset + 30 + length + extra
        if self.offset + self.size > file.size:
            raise ValueError(f"{self.name} reaches beyond the end of the file")
        self.found_sound = False

    def is_sound(self) -> bool:
        if not self.found_sound:
            self.found_sound = self.file.checksum(self.offset, self.size) == self.checksum
        return self.found_sound

    def content(self) -> bytes:
        if not self.is_sound():
            raise ValueError(f"{self.name} does not have its checksum")
        return bytes(self.file.held(self.offset, self.offset + self.size))


def _entries(file: TensorFile) -> dict[str, Entry]:
    """The zip's entries by name, without their common folder."""
    start = bytes(file.held(0, 512))
    if start.startswith(BEFORE_ZIP) or start[257:262] == b"ustar":
        raise Refused("is in the format of PyTorch before 1.6; load it there and save it again")
    if not start.startswith(b"PK"):
        raise ValueError("not a zip, as PyTorch's files are")
    with zipfile.ZipFile(file.stream() if isinstance(file, RemoteFile) else file.path) as archive:
        infos = archive.infolist()
    for info in infos:  # an entry's header and name
        file.expect(info.header_offset, info.header_offset + 30 + len(info.orig_filename.encode()))
    if any(info.flag_bits & 1 for info in infos):
        raise Refused("is an encrypted zip; decrypt it")
    packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise Refused(f"holds compressed entries ({packed[0]}), PyTorch's are not; unpack it or save it again")
    if any(info.file_size != info.compress_size for info in infos):
        raise ValueError("an entry has two sizes")
    roots = [info.filename.removesuffix("data.pkl") for info in infos if info.filename.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused(f"is a zip with {len(roots) or 'no'} data.pkl, PyTorch's have one; fetch it again")
    entries = {info.filename.removeprefix(roots[0]): Entry(file, info) for info in infos}
    if len(entries) < len(infos):
        raise ValueError("two entries have one name")
    if "byteorder" in entries and (order := entries["byteorder"].content()) != b"little":
        raise Refused(f"was written by a {order.decode(errors='replace')}-endian machine; save it on a usual one")
    return entries


# ---------------------------------------------------------------------------------------------------------- the pickle


@dataclasses.dataclass(frozen=True)
class Name:
    """A name that the pickle looks up, or an object that it would have made by it: text, and nothing else."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    entry: Entry
    dtype: np.dtype
    size: int  # in elements


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor as it is pickled; offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _dict_in(entries: dict[str, Entry]) -> dict[str, Any]:
    """The dict that `data.pkl` builds: `View`s by name, and any other values."""
    program, instructions = io.BytesIO(entries["data.pkl"].content()), []
    with contextlib.suppress(ValueError):  # a truncated pickle: the names up to there are still reported
        for op, argument, _ in pickletools.genops(program):
            instructions.append((op.name, argument))
    names = [str(argument).replace(" ", ".") for op, argument in instructions if op in ("GLOBAL", "INST")]
    foreign = {name: None for name in names if name not in KNOWN}  # an ordered set
    try:
        made = _run(instructions, entries, foreign)
    except DAMAGE:
        if not foreign:
            raise
    if foreign:
        raise Refused(
            f"asks for {', '.join(foreign)}, which no file of weights needs; nothing of it was run: do not trust the "
            "file, or save the model's state_dict alone"
        )
    if not isinstance(made, dict):
        raise Refused(f"holds {_kind(made)}, not a dict of tensors; save the model's state_dict")
    return made


def _run(instructions: list[tuple[str, Any]], entries: dict[str, Entry], foreign: dict[str, None]) -> Any:
    """Interpret a pickle with a stack, the stacks below marks, and a memo. Unknown names join `foreign`."""
    stack: list[Any] = []
    waiting: list[list[Any]] = []
    memo: dict[int, Any] = {}
    constants = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
    for op, argument in instructions:
        items: list[Any] = []
        if op in ("TUPLE", "SETITEMS", "APPENDS", "INST"):  # they take all that lies above the mark
            items, stack = stack, waiting.pop()
        match op:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                waiting.append(stack)
                stack = []
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(constants[op])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES":  # only beside foreign names, which are then all listed
                stack.append(argument)
            case "TUPLE":
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                parts = [stack.pop() for _ in range(int(op[-1]))]
                stack.append(tuple(reversed(parts)))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                _fill(stack[-2], [stack.pop()])
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _fill(stack[-1], [key, value])
            case "APPENDS" | "SETITEMS":
                _fill(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL" | "INST":
                stack.append(Name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                name = f"{module}.{last}"
                if name not in KNOWN:
                    foreign["".join(letter if letter.isprintable() else "?" for letter in name)] = None
                stack.append(Name(name))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), entries))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_made(function, arguments))
            case "BUILD":  # a state_dict's `_metadata`: module versions
                stack.pop()
                if not isinstance(stack[-1], dict | Name):
                    raise ValueError("the pickle gives a state to what has none")
            case _:
                raise ValueError(f"the pickle has the instruction {op}, which torch.save does not write")
    raise ValueError("the pickle has no end")


def _fill(target: Any, items: list[Any]) -> None:
    """Append to a list, or set keys and values of a dict; an object of a foreign name takes anything."""
    match target:
        case list():
            target += items
        case dict():
            for key, value in zip(items[::2], items[1::2], strict=True):
                if not isinstance(key, str | int | Name):  # no key with a recursive hash
                    raise ValueError("the pickle has a key that is no name")
                target[key.name if isinstance(key, Name) else str(key)] = value
        case Name():
            pass
        case _:
            raise ValueError("the pickle fills what cannot be filled")


def _storage(reference: Any, entries: dict[str, Entry]) -> Storage | Name:
    """The storage of a persistent id that `torch.save` wrote."""
    match reference:
        case ("storage", Name(name), str(key), _, int(size)) if name in STORAGES:
            entry, dtype = entries[f"data/{key}"], STORAGES[name]
            if entry.size != size * dtype.itemsize:
                raise ValueError(f"{entry.name} holds {entry.size} bytes, its tensors {size * dtype.itemsize}")
            return Storage(entry, dtype, size)
        case ("storage", Name(name), *_):
            return Name(name)
    raise ValueError("the pickle refers to something other than a storage")


def _made(function: Any, arguments: Any) -> Any:
    """The result of a call in the pickle: of one of the three known functions, or a Name for a foreign one."""
    match function, arguments:
        case Name(name), _ if name not in KNOWN:
            return function
        case Name(name), () if name == DICT:
            return {}
        # Then: requires_grad, hooks, and in newer files flags for a pending negation or conjugation.
        case Name(name), (Storage() as storage, offset, tuple(shape), tuple(strides), _, hooks, *bits) if (
            name == TENSOR
        ):
            numbers = (offset, *shape, *strides)
            whole = all(type(number) is int and number >= 0 for number in numbers)
            if not whole or len(shape) != len(strides) or len(shape) > 32:
                raise ValueError("the pickle has a tensor of no shape")
            if hooks or any(bits):
                raise ValueError("the pickle has a tensor with hooks or pending changes")
            if math.prod(shape) > storage.size:  # with strides of 0 one number could have any shape
                raise ValueError(f"the pickle has a tensor of shape {list(shape)} in a storage of {storage.size}")
            last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            if math.prod(shape) and last >= storage.size:
                raise ValueError(f"{storage.entry.name} is too short for a tensor of shape {list(shape)}")
            return View(storage, offset, shape, strides)
        case Name(name), (View() as view, _, hooks) if name == PARAMETER and not hooks:
            return view
    raise ValueError("the pickle calls what is no function")


def _kind(value: Any) -> str:
    return f"a dict of {len(value)}" if isinstance(value, dict) else f"a value of type {type(value).__name__}"


def _tensor(view: View) -> Tensor:
    storage, width = view.storage, view.storage.dtype.itemsize
    offset, strides = storage.entry.offset + view.offset * width, tuple(stride * width for stride in view.strides)
    tensor = storage.entry.file.tensor(offset, view.shape, storage.dtype, strides)
    asked = 0

    def read(index: Index) -> np.ndarray:
        nonlocal asked
        asked += math.prod(span.stop - span.start for span in index) * width
        entry = storage.entry
        if (entry.size <= UNCHECKED or asked > UNCHECKED) and not entry.is_sound():
            raise UserError(f"{entry.file.path}: {entry.name} does not have its checksum; fetch it again")
        return tensor.read(index)

    return Tensor(view.shape, storage.dtype, read, tensor.expect)
