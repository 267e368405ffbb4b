"""Small files of a workdir: JSON lines that a killed process leaves readable, and files replaced whole."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator

from lowrank.errors import UserError
from lowrank.files import bucket, paths
from lowrank.parallel import distributed


@contextlib.contextmanager
def writing(file: pathlib.Path) -> Iterator[None]:
    """Turn an OSError (a full or read-only disk) into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file} could not be written ({error.strerror}); make room and run the same command again"
        ) from error


def replace(file: paths.Path, text: str) -> None:
    """Replace the file's content atomically, even through a power cut. Only process 0 writes."""
    if not distributed.is_first():
        return
    if isinstance(file, bucket.BucketPath):
        bucket_lines.pop(file, None)
        file.write_bytes(text.encode())
        return
    fresh = file.with_suffix(".tmp")
    with writing(file):
        _write_durably(fresh, text, "w")
        fresh.replace(file)


def append_line(file: paths.Path, record: dict) -> None:
    """Append one JSON object; on a disk it is durable at once, in a bucket after `flush_lines`. Only process 0 writes."""
    if not distributed.is_first():
        return
    line = json.dumps(record, ensure_ascii=False) + "\n"
    if isinstance(file, bucket.BucketPath):
        bucket_lines.setdefault(file, BucketLines(file)).append(line)
        return
    with writing(file):
        _write_durably(file, line, "a")


def _write_durably(file: pathlib.Path, text: str, mode: str) -> None:
    with open(file, mode, encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


class BucketLines:
    """The lines of an object in a bucket, which can only be replaced whole, about once a second at most.

    They are written before every checkpoint, and when 10 seconds have passed (longer where writing takes more than a twentieth
    of the time). A killed run loses only lines after its last checkpoint, and writes those again when it resumes.
    """

    def __init__(self, file: bucket.BucketPath):
        self.file = file
        self.content = bytearray(file.read_bytes() if file.exists() else b"")
        self.written, self.next = True, 0.0

    def append(self, line: str) -> None:
        self.content += line.encode()
        self.written = False
        if time.monotonic() >= self.next:
            self.flush()

    def flush(self) -> None:
        if not self.written:
            began = time.monotonic()
            self.file.write_bytes(bytes(self.content))
            now = time.monotonic()
            self.written, self.next = True, now + max(SECONDS_BETWEEN, 20 * (now - began))


SECONDS_BETWEEN = 10.0
bucket_lines: dict[bucket.BucketPath, BucketLines] = {}


def flush_lines() -> None:
    """Write all lines that are still to go to a bucket."""
    for lines in bucket_lines.values():
        lines.flush()


def read_lines(file: paths.Path) -> list[dict]:
    """The records of a JSON-lines file, without a last line that a kill cut short. UserError for one that is damaged."""
    if isinstance(file, bucket.BucketPath) and file in bucket_lines:
        bucket_lines[file].flush()
    if not file.exists():
        return []
    records = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{file}, line {number}: not a line of JSON ({error}); remove that line") from None
    return records


def forget_after(file: paths.Path, step: int) -> None:
    """Drop the records of steps after `step`, which a resumed run writes again. Atomic."""
    if distributed.is_first() and file.exists():
        kept = [record for record in read_lines(file) if record["step"] <= step]
        replace(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
