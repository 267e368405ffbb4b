"""A tensor as it lies in a file: known by name and shape, read part by part, through a map of the file into memory.

Every format of a checkpoint becomes a table of such tensors, so whatever follows (the check, the import, the merge, the
fingerprint) is written once. A part that was read is let go of again: the pages of a mapped file would else count as
this process's memory until the whole base is in it twice. Files in a bucket are `remote_file.py`'s.
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
    expect: Callable[[Index], None] = lambda index: None  # says what will be read soon: from afar, it is sent for

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        return self.read(tuple(slice(0, size) for size in self.shape))


class TensorFile:
    """A file mapped into memory, in which tensors lie at known places."""

    def __init__(self, path: os.PathLike):
        self.path = path
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    # ---- What a file elsewhere does otherwise

    def held(self, start: int, stop: int) -> memoryview:
        """The bytes between two places, as far as the file goes."""
        return memoryview(self.map)[start:stop]

    def expect(self, start: int, stop: int) -> None:
        """These bytes will be read soon."""

    def release(self, start: int, stop: int) -> None:
        """Give the pages between two bytes back; whoever reads them again finds them in the disk's cache.

        Those around them too, which were mapped along with them.
        """
        start = max(0, start - AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
        stop = min(stop + AROUND, self.size)
        if stop > start:
            self.map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    # ---- What all have in common

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
            """The first byte, and the one behind the last."""
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
                # Some columns of several rows: the rows whole, which other devices' columns lie in, too.
                self.expect(offset + index[0].start * strides[0], offset + index[0].stop * strides[0])
            elif all(span.stop > span.start for span in index):
                self.expect(*place(index))

        return Tensor(tuple(shape), dtype, read, expect)

    def checksum(self, offset: int, size: int) -> int:
        """CRC-32 of some bytes, of which little is in memory at a time."""
        crc = 0
        for at in range(offset, offset + size, CHECKED_AT_ONCE):
            end = min(at + CHECKED_AT_ONCE, offset + size)
            crc = zlib.crc32(self.held(at, end), crc)
            self.release(at, end)
        return crc


def rows_within(nbytes: int, row_bytes: int) -> int:
    """How many rows fit in so many bytes, at least one; a power of two, so that larger cuts hold smaller ones whole."""
    return 1 << max(0, (nbytes // max(1, row_bytes)).bit_length() - 1)


def cut(span: slice, rows: int) -> list[slice]:
    """A span in parts of so many rows; the last may have fewer."""
    return [slice(start, min(start + rows, span.stop)) for start in range(span.start, span.stop, rows)]


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
