"""TODO files.lines"""

import contextlib
import json
import os
import pathlib
import time

from lowrank.errors import UserError
from lowrank.files import bucket, paths
from lowrank.parallel import distributed


@contextlib.contextmanager
def writing(file: pathlib.Path):
    """A disk that is full or read-only is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file} could not be written ({error.strerror}); make room and run the same command again"
        ) from error


def replace(file: paths.Path, text: str):
    """Give the file a new content: whole, or (after a power cut, too) still the old one."""
    if not distributed.is_first():
        return
    if paths.is_remote(file):
        bucket_lines.pop(file, None)
        file.write_bytes(text.encode())
        return
    fresh = file.with_suffix(".tmp")
    with writing(file):
        with open(fresh, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(file)


def append_line(file: paths.Path, record: dict):
    """Append one JSON object and have it on the disk before going on; in a bucket it is there after `flush_lines`."""
    if not distributed.is_first():
        return
    line = json.dumps(record, ensure_ascii=False) + "\n"
    if paths.is_remote(file):
        bucket_lines.setdefault(file, BucketLines(file)).append(line)
        return
    with writing(file), open(file, "a", encoding="utf-8") as stream:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


class BucketLines:
    """The lines of an object, which can only be replaced whole, and about once a second at most.

    So it is not written for each line, but where 10 seconds have passed (more if writing takes long: it may take a twentieth
    of the time), and before every checkpoint. A run that is killed loses lines after its last checkpoint alone, and these
    are written again when it goes on from there.
    """

    def __init__(self, file: bucket.BucketPath):
        self.file = file
        self.content = bytearray(file.read_bytes() if file.exists() else b"")
        self.written, self.next = True, 0.0

    def append(self, line: str):
        self.content += line.encode()
        self.written = False
        if time.monotonic() >= self.next:
            self.flush()

    def flush(self):
        if not self.written:
            began = time.monotonic()
            self.file.write_bytes(bytes(self.content))
            now = time.monotonic()
            self.written, self.next = True, now + max(SECONDS_BETWEEN, 20 * (now - began))


SECONDS_BETWEEN = 10.0
bucket_lines: dict[bucket.BucketPath, BucketLines] = {}


def flush_lines():
    """Have every line in its bucket; those on a disk are there already."""
    for lines in bucket_lines.values():
        lines.flush()


def read_lines(file: paths.Path) -> list[dict]:
    """The whole lines of a JSON-lines file; a last line that was cut short by a kill is left out."""
    if file in bucket_lines:
        bucket_lines[file].flush()
    if not file.exists():
        return []
    whole = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in whole]


def forget_after(file: paths.Path, step: int):
    """Drop the lines of steps after `step`, which a resumed run is about to write again. Atomic."""
    if distributed.is_first() and file.exists():
        kept = [record for record in read_lines(file) if record["step"] <= step]
        replace(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
