"""Tensor files in a bucket: `tensor_file.py` by requests for ranges of bytes.

A request takes some 50 ms to its first byte, so bands of 1 MB are fetched in parts of 4 MB, many at a time, as soon as a
reader announces them. Parts are kept until newer ones need their room, because devices that hold other columns of a tensor
read the same rows: at most `KEPT_BYTES`, whatever the base's size. Rows are fetched whole, because columns of a row are
too few bytes for a request each.
"""

import collections
import concurrent.futures
import functools
import io
import threading
from typing import NamedTuple

from lowrank.files.bucket import BucketPath
from lowrank.files.paths import PathLike
from lowrank.files.paths import path as path_of
from lowrank.weights.tensor_file import TensorFile

PART_BYTES = 2**22  # per request: its transfer takes about as long as its latency
CRUMB_BYTES = 2**16  # parts up to this size (a fingerprint's samples) are fetched again with what is around them
STREAMS = 32  # requests at a time
KEPT_BYTES = 2**28


def open_tensor_file(where: PathLike) -> TensorFile:
    file = path_of(where)
    return RemoteFile(file) if isinstance(file, BucketPath) else TensorFile(file)


class Part(NamedTuple):
    start: int
    stop: int
    content: concurrent.futures.Future


class RemoteFile(TensorFile):
    def __init__(self, where: BucketPath):
        self.path, self.size = where, where.stat().st_size

    def held(self, start: int, stop: int) -> memoryview:
        parts = _kept.parts(self.path, start, min(stop, self.size))
        pieces = []
        for part in parts:
            content = memoryview(part.content.result())
            pieces.append(content[max(start - part.start, 0) : min(stop, part.stop) - part.start])
            start = part.stop
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def expect(self, start: int, stop: int) -> None:
        _kept.parts(self.path, start, min(stop, self.size))

    def release(self, start: int, stop: int) -> None:
        """Nothing to do: newer parts replace old ones."""

    def stream(self) -> io.BufferedReader:
        return io.BufferedReader(_Stream(self))


class _Stream(io.RawIOBase):
    """The file as a seekable stream."""

    def __init__(self, file: RemoteFile):
        self.file, self.at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.file.size}[whence]
        return self.at

    def readinto(self, out) -> int:
        found = self.file.held(self.at, self.at + len(out)) if self.at < self.file.size else b""
        out[: len(found)] = found
        self.at += len(found)
        return len(found)


class Kept:
    """The newest parts of files, fetched or being fetched, up to `limit` bytes."""

    def __init__(self, limit: int = KEPT_BYTES):
        self.limit, self.nbytes = limit, 0
        self.lock = threading.Lock()
        self.by_age: collections.OrderedDict[tuple[str, int, int], Part] = collections.OrderedDict()
        self.near: dict[tuple[str, int], list[Part]] = collections.defaultdict(list)  # by start // PART_BYTES

    def parts(self, file: BucketPath, start: int, stop: int) -> list[Part]:
        """Contiguous parts that cover the bytes from `start` to before `stop`; missing ones are requested."""
        found = []
        with self.lock:
            while start < stop:
                part = self._covering(file.where, start)
                part = part or self._request(file, start, self._gap_end(file.where, start, stop))
                self.by_age.move_to_end((file.where, part.start, part.stop))
                found.append(part)
                start = part.stop
        return found

    def _around(self, where: str, at: int) -> list[Part]:
        """Parts that may hold byte `at`, or start less than a part after it. Failed ones are dropped."""
        number = at // PART_BYTES
        for n in (number - 1, number, number + 1):
            for part in [*self.near.get((where, n), ())]:
                if part.content.done() and part.content.exception():
                    self._forget(where, part)
        return [part for n in (number - 1, number, number + 1) for part in self.near.get((where, n), ())]

    def _covering(self, where: str, at: int) -> Part | None:
        covering = (part for part in self._around(where, at) if part.start <= at < part.stop)
        return max(covering, key=lambda part: part.stop, default=None)

    def _gap_end(self, where: str, start: int, stop: int) -> int:
        """Where the missing bytes after `start` end: at the next part, or after PART_BYTES."""
        begun = (p.start for p in self._around(where, start) if p.start > start and p.stop - p.start > CRUMB_BYTES)
        return min([stop, start + PART_BYTES, *begun])

    def _request(self, file: BucketPath, start: int, stop: int) -> Part:
        part = Part(start, stop, _requests().submit(file.read_range, start, stop))
        self.by_age[file.where, start, stop] = part
        self.near[file.where, start // PART_BYTES].append(part)
        self.nbytes += stop - start
        while self.nbytes > self.limit and len(self.by_age) > 1:
            oldest = next(iter(self.by_age))
            self._forget(oldest[0], self.by_age[oldest])
        return part

    def _forget(self, where: str, part: Part) -> None:
        del self.by_age[where, part.start, part.stop]
        self.near[where, part.start // PART_BYTES].remove(part)
        self.nbytes -= part.stop - part.start


@functools.cache
def _requests() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(STREAMS, thread_name_prefix="bucket")


_kept = Kept()
