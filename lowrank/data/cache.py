"""Examples that are encoded once: arrays on a disk, memory-mapped, so that data may be larger than memory.

One idea: an entry of the cache is named by a hash of all that decides the tokens: the content of the data and of the tokenizer,
the settings, and the code that encodes. So an entry is never out of date, and runs may share a folder of them. It appears whole
(it is renamed), however many processes write it.

Several processes encode a share of the blocks each, as files that all of them see. On a disk the first process joins these; in a
bucket, whose objects cannot be mapped, they are the entry, and each process joins them in a temporary folder of its own.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import pathlib
import shutil
import tempfile
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from lowrank.data import examples as examples_lib
from lowrank.data import files
from lowrank.data.examples import Columns, Examples, encode_blocks, of_records, one_format
from lowrank.data.records import Record, iterate_records
from lowrank.data.tokenizer import COMPANIONS, Tokenizer
from lowrank.errors import UserError
from lowrank.files import paths
from lowrank.files.bucket_lock import is_gone, this_process
from lowrank.formatting import format_bytes
from lowrank.parallel import distributed

META = "meta.json"  # written last
WRITER = "writer.json"  # the process that writes an entry
NFS_SECONDS = 60  # how long NFS may show a host what a folder held before another host wrote to it
EACH = {"record": np.int32, "truncated": bool, "targets": np.int32}  # one for each example, as `Columns` has them
ARRAYS = ("ids", "trained", "lengths", *EACH)


class Data(NamedTuple):
    """What is read, and how examples are made of it."""

    sources: tuple[str, ...]  # files, folders, patterns, data sets of the hub
    format: str
    columns: dict[str, str]
    system: str | None
    max_length: int
    train_on_prompt: bool
    overflow: str

    @property
    def name(self) -> str:
        return ", ".join(self.sources)


Counting = Callable[[str], contextlib.AbstractContextManager[Callable[[float], None]]]


def read_examples(
    data: Data, tokenizer: Tokenizer, cache: paths.Path | None, counting: Counting | None = None
) -> tuple[str, Examples]:
    """-> the records' format, and the examples: from the folder `cache`, where they are written the first time; without one
    they are encoded in memory. `counting("records")`: shows how many are encoded."""
    if cache is None:
        records = _Records(data)
        examples = Columns.joined(_encode(data, records, tokenizer))
        return records.format, of_records(examples, records.counts, data.name, data.max_length)
    entry = cache / _entry_name(data, tokenizer)
    same = {"data and tokenizer, by content": entry.name}
    distributed.refuse_differences(same, "give all of them the same command, code and files")
    with _explained(cache):
        if distributed.broadcast_from_first((entry / META).exists):
            print(f"tokens     those of {data.name} are in {entry}", flush=True)
        else:
            with counting("records") if counting else contextlib.nullcontext() as show:
                _write(entry, data, tokenizer, show)
        return _open(entry if isinstance(entry, pathlib.Path) else _joined_here(entry), data)


class _Records:
    """The records of all sources, one at a time; afterwards their format and how many each source has."""

    def __init__(self, data: Data):
        self.data, self.counts = data, tuple[int, ...]()
        self.records = self._read()
        self.first = next(self.records)  # there is one, or an error
        self.format = self.first.format

    def __iter__(self) -> Iterator[Record]:
        return itertools.chain([self.first], self.records)

    def _read(self) -> Iterator[Record]:
        data, first = self.data, None
        for source in data.sources:
            count = 0
            for record in iterate_records(source, data.format, data.columns, data.system):
                first = first or record
                if record.format != first.format:
                    one_format([first, record], data.name)
                yield record
                count += 1
            self.counts += (count,)


def _encode(data: Data, records: _Records, tokenizer: Tokenizer, share: tuple[int, int] = (0, 1)) -> Iterator[Columns]:
    options = (data.max_length, data.train_on_prompt, data.name, data.overflow, share)
    return encode_blocks(records, records.format, tokenizer, *options)


# ---- Writing an entry --------------------------------------------------------------------------------------------------


def _write(entry: paths.Path, data: Data, tokenizer: Tokenizer, show: Callable[[float], None] | None = None) -> None:
    process, processes = distributed.place()
    entry.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(entry, pathlib.Path):
        _remove_left_over(entry.parent)
    size = format_bytes(files.total_size(data.sources))
    print(f"encoding   {data.name} ({size}), once: the tokens go to {entry}", flush=True)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        records = _Records(data)

        def meta(**more) -> dict:  # known when all records are read
            notes = [str(note.message) for note in warned]
            narrow = tokenizer.vocab <= 1 << 16
            return {"format": records.format, "notes": notes, "counts": records.counts, "narrow": narrow, **more}

        blocks = _shown(_encode(data, records, tokenizer, (process, processes)), show)
        if isinstance(entry, pathlib.Path) and processes == 1:
            _write_arrays(entry, blocks, meta)
            return
        parts = entry.parent / f"{entry.name}.parts" if isinstance(entry, pathlib.Path) else entry
        parts.mkdir(exist_ok=True)
        for number, block in enumerate(blocks):
            if number % processes == process:
                (parts / f"{number}.npz").write_bytes(_packed(block))
    distributed.barrier("examples are encoded")
    if not distributed.is_first():
        pass
    elif isinstance(entry, pathlib.Path):
        _write_arrays(entry, _read_parts(parts, number + 1), meta)
        shutil.rmtree(str(parts))
    else:
        (entry / META).write_bytes(json.dumps(meta(blocks=number + 1)).encode())
    distributed.barrier("examples are written")


def _write_arrays(entry: pathlib.Path, blocks: Iterable[Columns], meta: Callable[[], dict]) -> None:
    """Append block after block to the arrays of an entry, which gets its name when it is whole."""
    part = entry.parent / f"{entry.name}.{uuid.uuid4().hex[:8]}"
    part.mkdir()
    (part / WRITER).write_text(json.dumps(this_process()), encoding="utf-8")
    try:
        with contextlib.ExitStack() as stack:
            out = {name: stack.enter_context(open(part / name, "wb")) for name in ARRAYS}
            for block in blocks:
                block.ids.astype(_id_type(meta())).tofile(out["ids"])
                np.diff(block.bounds).astype(np.int32).tofile(out["lengths"])
                for name in ("trained", *EACH):
                    getattr(block, name).tofile(out[name])
        checksums = {name: _checksum(part / name) for name in ARRAYS}
        (part / META).write_text(json.dumps(meta() | {"checksums": checksums}), encoding="utf-8")
        (part / WRITER).unlink()
        with contextlib.suppress(OSError):  # another run was faster
            part.rename(entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _shown(blocks: Iterable[Columns], show: Callable[[float], None] | None) -> Iterator[Columns]:
    for number, block in enumerate(blocks, 1):
        if show:
            show(number * examples_lib.BLOCK)
        yield block


def _remove_left_over(cache: pathlib.Path) -> None:
    """What writers that were killed have left."""
    for file in cache.glob(f"*.*/{WRITER}"):
        with contextlib.suppress(OSError, ValueError):
            if is_gone(json.loads(file.read_text(encoding="utf-8"))):
                shutil.rmtree(file.parent, ignore_errors=True)


def _checksum(file: pathlib.Path) -> int:
    checksum = 0
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 20):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _id_type(meta: dict) -> type:
    return np.uint16 if meta["narrow"] else np.int32


def _packed(block: Columns) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{name: getattr(block, name) for name in ("ids", "trained", "bounds", *EACH)})
    return stream.getvalue()


def _read_parts(parts: paths.Path, count: int) -> Iterator[Columns]:
    for number in range(count):
        _wait_for(parts / f"{number}.npz")
        with np.load(io.BytesIO((parts / f"{number}.npz").read_bytes())) as arrays:
            yield Columns(**arrays)


# ---- Reading one -------------------------------------------------------------------------------------------------------


def _open(entry: pathlib.Path, data: Data) -> tuple[str, Examples]:
    _wait_for(entry / META)
    try:
        meta = json.loads((entry / META).read_text(encoding="utf-8"))
        damaged = [name for name in ARRAYS if _checksum(entry / name) != meta["checksums"][name]]
    except (FileNotFoundError, ValueError, KeyError):
        damaged = [META]
    if damaged:
        raise UserError(
            f"the tokens in {entry} are damaged ({', '.join(damaged)}): remove that folder, they are encoded anew"
        )
    for note in meta["notes"]:  # what was said when the data was read is said again
        warnings.warn(note, stacklevel=2)
    bounds = np.append(0, np.cumsum(np.fromfile(entry / "lengths", np.int32), dtype=np.int64))
    ids, trained = (
        np.asarray(np.memmap(entry / name, dtype, "r")) if bounds[-1] else np.zeros(0, dtype)
        for name, dtype in (("ids", _id_type(meta)), ("trained", bool))
    )
    columns = Columns(ids, trained, bounds, **{name: np.fromfile(entry / name, dtype) for name, dtype in EACH.items()})
    return meta["format"], of_records(columns, meta["counts"], data.name, data.max_length)


def _joined_here(entry: paths.Path) -> pathlib.Path:
    """An entry in a bucket as one in a temporary folder, which goes when the process ends."""
    meta = json.loads((entry / META).read_text(encoding="utf-8"))
    here = pathlib.Path(_temporary().name) / entry.name
    if not here.exists():
        _write_arrays(here, _read_parts(entry, meta["blocks"]), lambda: meta)
    return here


def _wait_for(file: paths.Path) -> None:
    """Until a file that another process has written is seen here: NFS may take a minute."""
    for _ in range(NFS_SECONDS if distributed.is_running() else 0):
        if file.exists():
            return
        time.sleep(1)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="lowrank-")


def _entry_name(data: Data, tokenizer: Tokenizer) -> str:
    """Of a hash of everything that decides the tokens."""
    beside = [tokenizer.path.parent / name for name in COMPANIONS]
    ends = (tokenizer.bos_token, tokenizer.bos_id, tokenizer.eos_token, tokenizer.eos_id)
    told = [
        data._replace(sources=tuple(str(files.content_hash(source)) for source in data.sources)),
        [paths.file_hash(file) for file in (tokenizer.path, *beside) if file.is_file()],
        (*ends, tokenizer.vocab, sorted(tokenizer.markers.items()), tokenizer.chat_template),
        _code_hash(),
        [importlib.metadata.version(name) for name in ("tokenizers", "sentencepiece", "jinja2")],
    ]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


@functools.cache
def _code_hash() -> str:
    """Of the code of this room, which reads and encodes."""
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _explained(cache: paths.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        shared = ", a folder that all processes see" if distributed.is_running() else ""
        raise UserError(
            f"the folder of tokens {cache} cannot be written or read ({error.strerror or error}): name another with "
            f"--config.data.cache{shared}"
        ) from error
