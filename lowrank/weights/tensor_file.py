"""A tensor as it lies in a file: known by name and shape, read part by part, through a map of the file into memory.

Every format of a checkpoint becomes a table of such tensors, so whatever follows (the check, the import, the merge, the
fingerprint) is written once. A part that was read is let go of again: the pages of a mapped file would else count as
this process's memory until the whole base is in it twice.
"""

import dataclasses
import math
import mmap
import os
import zlib
from collections.abc import Callable

import numpy as np

CHECKED_AT_ONCE = 2**24
AROUND = 2**21  # Linux maps what the disk was read in, 2 MB at most, where one byte of it is asked for
Index = tuple[slice, ...]  # within bounds, without steps, one for every axis


@dataclasses.dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]  # -> a copy in C order

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        return self.read(tuple(slice(0, size) for size in self.shape))


class TensorFile:
    """A file mapped into memory, in which tensors lie at known places."""

    def __init__(self, path: str | os.PathLike):
        self.path = path
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def tensor(
        self, offset: int, shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...] | None = None
    ) -> Tensor:
        """The tensor that begins at byte `offset`; `strides` are in bytes, by default those of C order.

        Raises ValueError if any of it lies outside the file.
        """
        if strides is None:
            strides = tuple(dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and not (
            offset >= 0 and min(strides, default=0) >= 0 and offset + last + dtype.itemsize <= self.size
        ):
            raise ValueError(f"bytes {offset} to {offset + last + dtype.itemsize} of a file of {self.size}")

        def read(index: Index) -> np.ndarray:
            whole = np.ndarray(shape, dtype, self.map, offset, strides)
            part = np.array(whole[index], order="C")
            starts = sum(span.start * stride for span, stride in zip(index, strides, strict=True))
            ends = sum((span.stop - 1) * stride for span, stride in zip(index, strides, strict=True))
            del whole  # a view of the map
            self._release(offset + starts, offset + ends + dtype.itemsize)
            return part

        return Tensor(tuple(shape), dtype, read)

    def checksum(self, offset: int, size: int) -> int:
        """CRC-32 of some bytes, of which little is in memory at a time."""
        crc = 0
        for at in range(offset, offset + size, CHECKED_AT_ONCE):
            end = min(at + CHECKED_AT_ONCE, offset + size)
            crc = zlib.crc32(memoryview(self.map)[at:end], crc)
            self._release(at, end)
        return crc

    def _release(self, start: int, end: int) -> None:
        """Give the pages between two bytes back; whoever reads them again finds them in the disk's cache.

        Those around them too, which were mapped along with them.
        """
        start = max(0, start - AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(end + AROUND, self.size)
        if end > start:
            self.map.madvise(mmap.MADV_DONTNEED, start, end - start)


def rows_within(nbytes: int, row_bytes: int) -> int:
    """How many rows fit in so many bytes, at least one; a power of two, so that larger cuts hold smaller ones whole."""
    return 1 << max(0, (nbytes // max(1, row_bytes)).bit_length() - 1)


def cut(span: slice, rows: int) -> list[slice]:
    """A span in parts of so many rows; the last may have fewer."""
    return [slice(start, min(start + rows, span.stop)) for start in range(span.start, span.stop, rows)]
