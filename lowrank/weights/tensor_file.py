"""Tensors in files: known by shape and dtype, and read part by part through a memory map.

Every checkpoint format becomes a table of such tensors, so what follows (check, import, merge, fingerprint) is written
once. Pages are released after reading: those of a mapped file count as this process's memory, so the base would be in it
twice. remote_file.py has the same for files in a bucket.
"""

import dataclasses
import math
import mmap
import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

CHECKED_AT_ONCE = 2**24
AROUND = 2**21  # on a fault Linux maps up to 2 MB around the byte
Index = tuple[slice, ...]  # within bounds, without steps, one for every axis


@dataclasses.dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]  # -> a copy in C order
    expect: Callable[[Index], None] = lambda index: None  # announces a read: a file in a bucket starts to fetch it

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        return self.read(tuple(slice(0, size) for size in self.shape))


class TensorFile:
    """A memory-mapped file with tensors at known offsets."""

    def __init__(self, path: os.PathLike):
        self.path: Any = path
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None

    # ---- Overridden by RemoteFile

    def held(self, start: int, stop: int) -> memoryview:
        """The bytes from `start` to before `stop` or the file's end."""
        return memoryview(self.map or b"")[start:stop]

    def expect(self, start: int, stop: int) -> None:
        """Announce that these bytes will be read soon."""

    def release(self, start: int, stop: int) -> None:
        """Unmap the pages of these bytes and those mapped around them; the disk's cache keeps them."""
        start = max(0, start - AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
        stop = min(stop + AROUND, self.size)
        if self.map and stop > start:
            self.map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    # ---- Common to both

    def tensor(
        self, offset: int, shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...] | None = None
    ) -> Tensor:
        """The tensor that begins at byte `offset`; `strides` are in bytes, by default those of C order.

        Raises ValueError if any of it lies outside the file.
        """
        in_order = tuple(dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        strides = in_order if strides is None else strides
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and not (
            offset >= 0 and min(strides, default=0) >= 0 and offset + last + dtype.itemsize <= self.size
        ):
            raise ValueError(f"bytes {offset} to {offset + last + dtype.itemsize} of a file of {self.size}")

        def place(index: Index) -> tuple[int, int]:
            """The first byte, and the one after the last."""
            first = sum(span.start * stride for span, stride in zip(index, strides, strict=True))
            last = sum((span.stop - 1) * stride for span, stride in zip(index, strides, strict=True))
            return offset + first, offset + last + dtype.itemsize

        def read(index: Index) -> np.ndarray:
            sizes = [span.stop - span.start for span in index]
            if not math.prod(sizes):
                return np.empty(sizes, dtype)
            start, stop = place(index)
            part = np.array(np.ndarray(sizes, dtype, self.held(start, stop), 0, strides), order="C")
            self.release(start, stop)
            return part

        def expect(index: Index) -> None:
            if index and strides == in_order and index[0].stop - index[0].start > 1:
                # Columns of several rows: fetch whole rows, which hold other devices' columns too.
                self.expect(offset + index[0].start * strides[0], offset + index[0].stop * strides[0])
            elif all(span.stop > span.start for span in index):
                self.expect(*place(index))

        return Tensor(tuple(shape), dtype, read, expect)

    def checksum(self, offset: int, size: int) -> int:
        """CRC-32 of `size` bytes, read 16 MB at a time."""
        crc = 0
        for at in range(offset, offset + size, CHECKED_AT_ONCE):
            end = min(at + CHECKED_AT_ONCE, offset + size)
            crc = zlib.crc32(self.held(at, end), crc)
            self.release(at, end)
        return crc


def rows_within(nbytes: int, row_bytes: int) -> int:
    """How many rows fit in `nbytes`, at least one; a power of two, so that larger cuts contain whole smaller ones."""
    return 1 << max(0, (nbytes // max(1, row_bytes)).bit_length() - 1)


def cut(span: slice, rows: int) -> list[slice]:
    """A span in parts of `rows` rows; the last may be shorter."""
    return [slice(start, min(start + rows, span.stop)) for start in range(span.start, span.stop, rows)]


def in_files(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in the same order, for files of up to `limit` bytes each; a larger tensor has its own."""
    files: list[list[str]] = [[]]
    left = limit
    for name, size in sizes.items():
        if files[-1] and size > left:
            files.append([])
            left = limit
        files[-1].append(name)
        left -= size
    return files


def transpose(source: np.ndarray, out: np.ndarray) -> None:
    """Write `source` [m, n] into `out` [n, m], in the dtype of `out`.

    In bands of 64 rows, which fit the cache, copied to rows one cache line longer: a cache holds only few rows that lie a
    power of two apart. 2.4 GB/s on one core in bfloat16; 0.2 with `out[...] = source.T`.
    """
    columns = source.shape[1]
    apart = np.empty((64, columns + 64 // out.dtype.itemsize), out.dtype)
    for start in range(0, len(source), 64):
        band = apart[: len(source) - start, :columns]
        band[...] = source[start : start + 64]
        out[:, start : start + 64] = band.T
