"""Read PyTorch's files (`.bin`, `.pth`, `.pt`) without PyTorch and without running code from them.

Such a file is a zip of stored entries: `data.pkl`, a pickle of a dict of tensors, and `data/KEY`, the tensors' bytes.
A pickle is a program. The standard library's unpickler runs it with only the instructions that `torch.save` writes for a
dict of tensors, and looks names up in a table of three functions here: it cannot import or call anything else. Files with
other names are refused.

Tensors stay in the mapped file. The zip has a checksum of every entry: it is compared as soon as more of a tensor is read
than a fingerprint samples, for small entries at once. So opening 13 GB reads some megabytes, and no damaged weight is
loaded. Left out: files from before PyTorch 1.6 (2020), and from big-endian machines.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

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

INSTRUCTIONS = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL INST STACK_GLOBAL BINPERSID REDUCE NEWOBJ BUILD
""".split()  # bytes and INST occur only beside foreign names, which are then all listed

# Bytes of one tensor that are read before its entry's checksum is compared. A fingerprint takes 16 samples of up to 2048
# float32, and a row of the embedding shows whether the head is the same matrix.
UNCHECKED = 262_144
BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number of files until 2020

# What this file and the standard library raise for damaged bytes.
DAMAGE = (
    ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, NotImplementedError, RuntimeError,
    struct.error, zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip


def open_torch_file(where: PathLike, problems: list[str]) -> dict[str, Tensor]:
    """Every tensor of a file with a dict of them, by name; what is wrong with the file joins `problems`.

    Reading a tensor raises UserError if its bytes do not match their checksum.
    """
    path = path_of(where)
    try:
        values = _dict_in(_entries(open_tensor_file(path)))
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
        if isinstance(value, Tensor) and value.dtype.name in DTYPES:
            tensors[name] = value
        elif isinstance(value, Tensor) and not is_ignored(name):
            problems.append(f"{name} is held in {value.dtype.name}, supported are {', '.join(DTYPES)}")
        elif not is_ignored(name):
            problems.append(f"{path.name}: {name} is {_kind(value)}, not a tensor")
    return tensors


class Refused(Exception):
    """The file may be undamaged, but cannot be read; the text continues after the file's name."""


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


class Storage(NamedTuple):
    entry: Entry
    dtype: np.dtype


def _dict_in(entries: dict[str, Entry]) -> dict[str, Any]:
    """The dict that `data.pkl` builds: tensors by name, and any other values."""
    unpickler = Unpickler(entries)
    made = None
    try:
        made = unpickler.load()
    except EOFError:
        if not unpickler.foreign:
            raise ValueError("the pickle has no end") from None
    except DAMAGE:
        if not unpickler.foreign:
            raise
    if unpickler.foreign:
        raise Refused(
            f"asks for {', '.join(unpickler.foreign)}, which no file of weights needs; nothing of it was run: do not "
            "trust the file, or save the model's state_dict alone"
        )
    if not isinstance(made, dict):
        raise Refused(f"holds {_kind(made)}, not a dict of tensors; save the model's state_dict")
    return made


def _kind(value: Any) -> str:
    return f"a dict of {len(value)}" if isinstance(value, dict) else f"a value of type {type(value).__name__}"


class Foreign:
    """Stands for what a foreign name would be or make: takes anything and does nothing."""

    def __init__(self, *_):
        pass

    __call__ = append = extend = __setitem__ = lambda self, *_: self


class Dict(dict):
    def __init__(self):  # no items: `dict` would not ask `__setitem__`
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int | Foreign):  # no key with a recursive hash
            raise ValueError("the pickle has a key that is no name")
        super().__setitem__(str(key), value)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, _: Any, hooks: Any, *pending: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`: offset and strides in elements; `_` is requires_grad.

    `pending` are the flags for a negation or conjugation, in newer files.
    """
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("the pickle has a tensor of no storage")
    if not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)) or len(shape) > 32:
        raise ValueError("the pickle has a tensor of no shape")
    if hooks or any(pending):
        raise ValueError("the pickle has a tensor with hooks or pending changes")
    (entry, dtype), count = storage, math.prod(shape)
    size = entry.size // dtype.itemsize
    if count > size:  # with strides of 0 one number could have any shape
        raise ValueError(f"the pickle has a tensor of shape {list(shape)} in a storage of {size}")
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if count and last >= size:
        raise ValueError(f"{entry.name} is too short for a tensor of shape {list(shape)}")
    in_bytes = tuple(stride * dtype.itemsize for stride in strides)
    tensor = entry.file.tensor(entry.offset + offset * dtype.itemsize, shape, dtype, in_bytes)
    asked = 0

    def read(index: Index) -> np.ndarray:
        nonlocal asked
        asked += math.prod(span.stop - span.start for span in index) * dtype.itemsize
        if (entry.size <= UNCHECKED or asked > UNCHECKED) and not entry.is_sound():
            raise UserError(f"{entry.file.path}: {entry.name} does not have its checksum; fetch it again")
        return tensor.read(index)

    return Tensor(shape, dtype, read, tensor.expect)


def _parameter(tensor: Any, _: Any, hooks: Any) -> Any:
    """`torch._utils._rebuild_parameter`; `_` is requires_grad."""
    if hooks:
        raise ValueError("the pickle has a tensor with hooks or pending changes")
    return tensor


KNOWN: dict[str, Any] = STORAGES | {
    "collections.OrderedDict": Dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}


class Instructions(dict):
    def __missing__(self, code: int) -> None:
        name = next((known.name for known in pickletools.opcodes if known.code == chr(code)), f"{code:#x}")
        raise ValueError(f"the pickle has the instruction {name}, which torch.save does not write")


class Unpickler(pickle._Unpickler):  # in Python, because the one in C keeps its instructions to itself
    stack: list[Any]  # set by `load`, as `append` to it
    append: Callable[[Any], None]

    def __init__(self, entries: dict[str, Entry]):
        super().__init__(io.BytesIO(entries["data.pkl"].content()))
        self.entries = entries
        self.foreign: dict[str, None] = {}  # an ordered set of names

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in KNOWN:
            return KNOWN[full]
        self.foreign["".join(letter if letter.isprintable() else "?" for letter in full)] = None
        return Foreign

    def persistent_load(self, reference: Any) -> Any:
        match reference:
            case ("storage", np.dtype() as dtype, str(key), _, int(size)):
                entry = self.entries[f"data/{key}"]
                if entry.size != size * dtype.itemsize:
                    raise ValueError(f"{entry.name} holds {entry.size} bytes, its tensors {size * dtype.itemsize}")
                return Storage(entry, dtype)
            case ("storage", kind, *_) if kind is Foreign:
                return Foreign()
        raise ValueError("the pickle refers to something other than a storage")

    def load_empty_dict(self) -> None:
        self.append(Dict())

    def load_build(self) -> None:
        """Drop the state: a state_dict's is its `_metadata`, module versions."""
        self.stack.pop()
        if not isinstance(self.stack[-1], Dict | Foreign):
            raise ValueError("the pickle gives a state to what has none")

    dispatch: ClassVar = Instructions(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in INSTRUCTIONS}
        | {pickle.EMPTY_DICT[0]: load_empty_dict, pickle.BUILD[0]: load_build}
    )
