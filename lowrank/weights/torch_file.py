"""PyTorch's own files (`.bin`, `.pth`, `.pt`): tensors read over a map of the file, without torch and without trust.

`torch.save` writes a zip archive in which tensors lie uncompressed, and beside them a pickle that says where. A pickle is
a program that may call anything. Here it can call three small functions of ours; any other global is noted, not run, and
refused by name.

Each tensor's storage has a CRC-32 in the archive, which is compared before the first read of more than 64 KB of it: so a
fingerprint stays cheap, and no damaged tensor is loaded (0.24 s of CPU time a GB).
Left out: what torch wrote before 1.6 (2020), which is no zip archive.
"""

import io
import math
import os
import pathlib
import pickle
import pickletools
import zipfile
import zlib
from typing import NamedTuple

import ml_dtypes
import numpy as np

from lowrank.errors import UserError
from lowrank.weights.tensor_file import Index, Tensor, TensorFile

STORAGES = {  # torch's classes -> dtypes; a tensor of another than a model's dtypes is left to the caller to refuse
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
GLOBALS = (
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    *(("torch", name) for name in STORAGES),
)
# What a pickle of a dict of tensors is made of. The others could make objects, or memory, out of nothing.
OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS
    BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
    """.split()
)
SMALL_BYTES = 65_536
CHUNK_BYTES = 2**24


class Stored(NamedTuple):
    """A tensor as the pickle describes it; offset and strides in elements of its storage."""

    key: str
    dtype: np.dtype
    elements: int  # of the storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Refused(Exception):
    """Why a file cannot be read."""


def open_torch_file(path: str | os.PathLike, problems: list[str]) -> dict[str, Tensor]:
    """Every tensor of one file by name; what is wrong with the file joins `problems`. Reads a few KB."""
    path = pathlib.Path(path)
    try:
        archive = _Archive(path)
        return {name: archive.tensor(name, stored) for name, stored in _described(archive).items()}
    except Refused as error:
        problems.append(f"{path.name} {error}")
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})")
    return {}


# ---------------------------------------------------------------------------------------------------------- the archive


class _Archive:
    """The zip archive over a map of the file: where its entries lie, and whether they are whole."""

    def __init__(self, path: pathlib.Path):
        self.file = TensorFile(path)
        self.checked: set[str] = set()
        if self.file.map[:4] != b"PK\x03\x04":
            old = "was written by a torch older than 1.6: load it with torch and save it again"
            known = self.file.map[:2] == b"\x80\x02" or self.file.map[257:262] == b"ustar"
            raise Refused(old if known else "is no file of torch.save (no zip archive), or it is corrupt")
        try:
            with zipfile.ZipFile(path) as archive:
                self.entries = {entry.filename: entry for entry in archive.infolist()}
        except Exception as error:  # whatever a broken archive makes the library raise
            raise Refused(f"cannot be read as a zip archive ({error}), it is truncated or corrupt") from None
        roots = [name.removesuffix("data.pkl") for name in self.entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Refused(f"is no file of torch.save (it holds {len(roots)} entries data.pkl, not one)")
        self.root = roots[0]
        self.places = {name: self._place(entry) for name, entry in self.entries.items()}
        if f"{self.root}byteorder" in self.entries and self.content("byteorder") != b"little":
            raise Refused("was written on a big-endian machine, which is not supported")

    def _place(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        """Where an entry's bytes begin and end: its local header has a length of its own, for torch aligns the data."""
        header = self.file.map[entry.header_offset : entry.header_offset + 30]
        name_length, extra_length = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        start = entry.header_offset + 30 + name_length + extra_length
        name = self.file.map[entry.header_offset + 30 : entry.header_offset + 30 + name_length]
        if header[:4] != b"PK\x03\x04" or name.decode("utf-8", "replace") != entry.filename:
            raise Refused(f"has no entry {entry.filename} where its directory says, it is corrupt")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise Refused(f"holds {entry.filename} compressed or encrypted, which torch.save never does")
        if start + entry.file_size > self.file.size:
            raise Refused(f"ends before its entry {entry.filename} does, it is truncated")
        return start, start + entry.file_size

    def content(self, name: str) -> bytes:
        self.check(name)
        return self.file.map[slice(*self.places[self.root + name])]

    def check(self, name: str) -> None:
        """Compare an entry with its CRC-32, once."""
        if name in self.checked:
            return
        start, end = self.places[self.root + name]
        crc = 0
        for at in range(start, end, CHUNK_BYTES):
            stop = min(at + CHUNK_BYTES, end)
            crc = zlib.crc32(memoryview(self.file.map)[at:stop], crc)
            self.file.release(at, stop)
        if crc != self.entries[self.root + name].CRC:
            raise Refused(f"holds other bytes in {self.root}{name} than were written (CRC-32), it is corrupt")
        self.checked.add(name)

    def tensor(self, name: str, stored: Stored) -> Tensor:
        entry = f"data/{stored.key}"
        start, end = self.places.get(self.root + entry, (0, -1))
        size, last = stored.dtype.itemsize, stored.offset
        last += sum((n - 1) * stride for n, stride in zip(stored.shape, stored.strides, strict=True))
        if end - start != stored.elements * size:
            raise Refused(f"holds {max(end - start, 0)} bytes for {name}, not {stored.elements * size}; it is corrupt")
        if math.prod(stored.shape) and last >= stored.elements:
            raise Refused(f"places {name} beyond its storage, it is corrupt")
        strides = tuple(stride * size for stride in stored.strides)
        mapped = self.file.tensor(start + stored.offset * size, stored.shape, stored.dtype, strides)

        def read(index: Index) -> np.ndarray:
            part = mapped.read(index)
            if part.nbytes > SMALL_BYTES or end - start <= SMALL_BYTES:
                try:
                    self.check(entry)
                except Refused as error:
                    raise UserError(f"{self.file.path} {error}; fetch it again") from None
            return part

        return Tensor(mapped.shape, mapped.dtype, read)


# ----------------------------------------------------------------------------------------------------------- the pickle


def _described(archive: _Archive) -> dict[str, Stored]:
    """The dict of tensors that the pickle describes."""
    content = archive.content("data.pkl")
    try:
        found = _unpickle(content)
    except Refused:
        raise
    except Exception as error:  # a pickle that is no sound one can raise anything, but not do anything
        raise Refused(f"holds a pickle that cannot be read ({type(error).__name__}: {error}), it is corrupt") from None
    if not isinstance(found, dict):
        raise Refused(f"holds a {type(found).__name__}, not a dict of tensors")
    odd = [f"{name!r} is a {type(value).__name__}" for name, value in found.items() if not isinstance(value, Stored)]
    odd += [f"{name!r} is no name" for name in found if not isinstance(name, str)]
    if odd:
        raise Refused(f"is no dict from names to tensors alone: {', '.join(odd[:5])}{' and more' * (len(odd) > 5)}")
    return found


def _unpickle(content: bytes):
    """The pickle's object. What it may call are closures made here, so that whatever it does to them ends with it."""
    foreign: set[str] = set()
    odd: list[str] = []
    for opcode, argument, at in pickletools.genops(content):
        if opcode.name == "GLOBAL" and tuple(argument.split(" ")) not in GLOBALS:
            foreign.add(argument.replace(" ", "."))
        elif opcode.name not in OPCODES:
            odd.append(f"{opcode.name} at byte {at}")
        elif opcode.name in ("BINPUT", "LONG_BINPUT") and argument > len(content):
            odd.append(f"{argument} notes in {len(content)} bytes")  # a demand for memory
    _refuse_foreign(foreign)
    if odd:
        raise Refused(f"holds a pickle with {odd[0]}, which no dict of tensors needs; do not trust the file")

    class OrderedDict(dict):
        def __setstate__(self, state):
            """Attributes that torch hangs onto it, `_metadata`: not wanted."""

    class Foreign:
        """Stands where something is refused, so that the rest of the pickle is still read and all is listed at once."""

        def __init__(self, *_):
            pass

        def __setstate__(self, state):
            pass

    def rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
        dtype, key, elements = storage
        numbers = (elements, offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise Refused(f"describes a tensor of shape {shape} with strides {strides} at {offset}, it is corrupt")
        return Stored(str(key), dtype, elements, offset, tuple(shape), tuple(strides))

    ours = (OrderedDict, rebuild_tensor, lambda tensor, requires_grad, hooks: tensor)
    # Of the storages the names are handed out: nothing can be called or changed through a word.
    known = dict(zip(GLOBALS, (*ours, *STORAGES), strict=True))

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) not in known:
                foreign.add(f"{module}.{name}")
            return known.get((module, name), Foreign)

        def persistent_load(self, saved):
            kind, storage, key, _, elements = saved
            if kind != "storage" or storage not in STORAGES:
                raise Refused(f"refers to {kind!r} of {storage!r}, not to a storage of numbers")
            return STORAGES[storage], key, elements

    try:
        found = Unpickler(io.BytesIO(content)).load()
    except Exception:
        if not foreign:  # else what is foreign is why
            raise
    _refuse_foreign(foreign)
    return found


def _refuse_foreign(names: set[str]) -> None:
    if names:
        listed = ", ".join(sorted(names))
        raise Refused(f"asks for {listed}, which no dict of tensors needs and which was not run; do not trust the file")
