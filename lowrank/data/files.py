"""Rows from the files that people have: JSON, JSON lines, CSV, TSV, Parquet, Arrow, plain text; each also as .gz or .zst.

One idea: the content decides what a file is, where it can (Parquet, Arrow, gzip and zstd begin with bytes of their own); the
name decides between texts. Parquet, Arrow and .zst need `pyarrow`, the extra `data`.
"""

import csv
import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from lowrank.data.hub_data import data_files
from lowrank.errors import UserError, meant
from lowrank.files import paths

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".txt")
PACKED = (".gz", ".zst")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
NO_DATA = {  # what begins so
    b"PK\x03\x04": "an archive (.zip, .xlsx, .docx, ...)",
    b"%PDF": "a PDF",
    b"\xd0\xcf\x11\xe0": "an Office document (.xls, .doc)",
}
CHUNK = 1 << 20  # characters of a JSON list that are read at once
ROWS = 1000  # of a Parquet file
DECODER, END = json.JSONDecoder(), object()
WHITESPACE = re.compile(r"[ \t\n\r]*")


class Row(NamedTuple):
    """What a file holds at one place: `line 7` of a file of lines or text, `item 7` of a list, `row 7` of a table."""

    fields: Any
    where: str


def find_files(where: str) -> Sequence[paths.Path]:
    """The files that a path names: itself, those of a folder (by name), those that a pattern with * ? [ ] matches, or those
    of a data set on the hub."""
    path = paths.path(where)
    if (of_hub := data_files(where)) is not None:
        return of_hub
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if suffix(file) in SUFFIXES)
        if not found:
            raise UserError(f"data folder {path} holds no file of data ({', '.join(SUFFIXES)}); name a file")
        return found
    if not path.exists() and re.search(r"[*?\[]", str(where)):
        found = [paths.path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise UserError(f"no data file matches {where}; name a file, a folder or another pattern")
        return found
    if not path.exists():
        raise UserError(f"data file {path} cannot be read (No such file or directory): {_remedy(path)}")
    return [path]


def _remedy(path: paths.Path) -> str:
    parts = str(path).split(",")
    if len(parts) > 1 and all(paths.path(part.strip()).exists() for part in parts):
        return f'several files are written as --config.data.train="({",".join(repr(part.strip()) for part in parts)})"'
    beside = path.parent.glob("*") if isinstance(path, pathlib.Path) else ()
    return f"name a file of data, or a folder{meant(path.name, (file.name for file in beside))}"


def total_size(sources: Iterable[str]) -> int:
    """Bytes of the files that are named."""
    return sum(file.stat().st_size for source in sources for file in find_files(source))


def sources_of(where: str | Sequence[str] | None) -> tuple[str, ...]:
    """What `data.train` names: one path, or several."""
    return () if where is None else (where,) if isinstance(where, str) else tuple(where)


def content_hash(where: str | Sequence[str] | None) -> str | None:
    """Of the content of all files that are named; of one file it is its own. None for none."""
    hashes = [paths.file_hash(file) for source in sources_of(where) for file in find_files(source)]
    if len(hashes) < 2:
        return hashes[0] if hashes else None
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:32]


def is_text(path: paths.Path) -> bool:
    return suffix(path) == ".txt"


def read_rows(path: paths.Path, lines: bool = False) -> Iterator[Row]:
    """The rows of a file, one at a time; UserError for a file that cannot be read, with all broken lines of one of JSON lines.

    Plain text is documents between blank lines, or `lines`.
    """
    try:
        with path.open("rb") as stored:
            yield from _rows(path, _unpacked(path, stored), lines)
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {_not_utf8(path)}: not UTF-8 text: save the file as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} cannot be unpacked ({error}): it is truncated or damaged; fetch it again") from None
    except OSError as error:
        if error.strerror is None:  # of zstd
            raise UserError(
                f"{path} cannot be unpacked ({error}): it is truncated or damaged; fetch it again"
            ) from None
        raise UserError(
            f"data file {path} cannot be read ({error.strerror}): name a file of data, or a folder"
        ) from None


def _rows(path: paths.Path, file: io.BufferedReader, lines: bool) -> Iterator[Row]:
    begin = file.peek(6)[:6]
    if begin[:4] in NO_DATA:
        raise UserError(f"{path} is {NO_DATA[begin[:4]]}: save what it holds as CSV or JSON lines")
    if begin[:4] == b"PAR1":
        yield from _table_rows(path, file, "parquet")
        return
    if begin == b"ARROW1" or begin[:4] == b"\xff\xff\xff\xff":
        yield from _table_rows(path, file, "arrow")
        return
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n") as text:
        numbered = enumerate((line[:-2] + "\n" if line.endswith("\r\n") else line for line in text), 1)
        if is_text(path) and lines:
            yield from (Row({"text": line.rstrip("\n")}, f"line {i}") for i, line in numbered if line.strip())
        elif is_text(path):
            yield from _documents(numbered)
        elif suffix(path) in SEPARATORS:
            yield from _separated_rows(path, (line for _, line in numbered), SEPARATORS[suffix(path)])
        else:
            first = next((pair for pair in numbered if pair[1].strip()), (1, ""))
            is_list = first[1].lstrip().startswith("[")
            yield from (
                _json_list(path, text, *first) if is_list else _json_lines(path, itertools.chain([first], numbered))
            )


def refuse(path: paths.PathLike, problems: list[tuple[str, str]]) -> None:
    """One UserError for the problems (where, what), if there are any: each kind once, with its places. What differs only in
    its numbers is of one kind; of kinds and of places no more than ten are shown."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for where, what in problems:
        kinds.setdefault(re.sub(r"\d+", "0", what), []).append((where, what))
    if kinds:
        shown = []
        for (first, what), *others in list(kinds.values())[:10]:
            places = list(dict.fromkeys([first, *(where for where, _ in others)]))
            where = ", ".join(places) if len(places) <= 10 else f"{first} (and {len(places) - 1} more)"
            shown.append(f"{where}: {what}")
        rest = f"; and {len(kinds) - 10} more" if len(kinds) > 10 else ""
        raise UserError(f"{path} has broken records, correct or remove them: {'; '.join(shown)}{rest}")


def suffix(path: paths.Path) -> str:
    """The suffix that says what a file holds, without that of its packing."""
    name = path.name.lower()
    for packing in PACKED:
        name = name.removesuffix(packing)
    return "." + name.rpartition(".")[2] if "." in name else ""


def _unpacked(path: paths.Path, stored: BinaryIO) -> io.BufferedReader:
    begin = stored.read(4)
    stored.seek(0)
    if begin[:2] == b"\x1f\x8b":
        return io.BufferedReader(gzip.GzipFile(fileobj=stored))  # type: ignore[arg-type]
    if begin == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(_pyarrow(path).CompressedInputStream(stored, "zstd"))
    return stored if isinstance(stored, io.BufferedReader) else io.BufferedReader(stored)  # type: ignore[arg-type]


def _not_utf8(path: paths.Path) -> int:
    """The number of the first line that is not UTF-8."""
    with path.open("rb") as stored:
        for number, line in enumerate(_unpacked(path, stored), 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _pyarrow(path: paths.Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install 'lowrank[data]'") from None
    return pyarrow


def _table_rows(path: paths.Path, file: io.BufferedReader, kind: str) -> Iterator[Row]:
    pyarrow = _pyarrow(path)
    source = file if file.seekable() else pyarrow.BufferReader(file.read())
    try:
        if kind == "parquet":
            batches = importlib.import_module("pyarrow.parquet").ParquetFile(source).iter_batches(ROWS)
        elif file.peek(6)[:6] == b"ARROW1":
            table = pyarrow.ipc.open_file(source)
            batches = map(table.get_batch, range(table.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(source)  # as the cache of `datasets` has it
        number = itertools.count(1)
        for batch in batches:
            for fields in batch.to_pylist():
                yield Row(fields, f"row {next(number)}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as {kind} ({error}): it is truncated or damaged; fetch it again"
        ) from None


def _separated_rows(path: paths.Path, text: Iterator[str], separator: str) -> Iterator[Row]:
    header = next(text, "")
    separator = next((other for other in (separator, ";", "\t", ",") if other in header), separator)
    lines = csv.reader(itertools.chain([header], text), delimiter=separator, strict=True)
    try:
        names = next(lines, [])
        for values in lines:
            if values and len(values) != len(names):
                message = f"{len(values)} values for {len(names)} columns: check its quotes and separators"
                raise UserError(f"{path}, line {lines.line_num}: {message}")
            if values:
                yield Row(dict(zip(names, values, strict=True)), f"line {lines.line_num}")
    except csv.Error as error:
        raise UserError(f"{path}, line {lines.line_num}: not valid CSV ({error}): check its quotes") from None


def _documents(lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    for is_blank, group in itertools.groupby(lines, lambda numbered: not numbered[1].strip()):
        if not is_blank:
            numbers, block = zip(*group, strict=True)
            yield Row({"text": "".join(block).removesuffix("\n")}, f"line {numbers[0]}")


def _json_list(path: paths.Path, file: io.TextIOWrapper, line: int, first: str) -> Iterator[Row]:
    """The items of a list, one at a time. `first` is the line that its bracket is on, `line` the number of that line."""
    text, at, number = first, first.index("[") + 1, 1
    while True:
        error = None
        try:
            item, end = _next_item(text, at, number == 1)
        except (json.JSONDecodeError, RecursionError) as wrong:
            error, end = wrong, len(text)
        # What ends with the text may go on in what is not read yet.
        if end == len(text) and (more := file.read(max(CHUNK, len(text)))):
            line += text.count("\n", 0, at)
            text, at = text[at:] + more, 0
        elif error:
            place = f"line {line + error.lineno - 1}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
            what = f"item {number}: {getattr(error, 'msg', error)}: {place}"
            raise UserError(f"{path}: not valid JSON ({what}): correct it, or write one record per line")
        elif item is END:
            if text[end:].strip() or file.read(CHUNK).strip():
                raise UserError(f"{path}: not valid JSON (something follows the list): correct it")
            return
        else:
            yield Row(item, f"item {number}")
            at, number = end, number + 1


def _next_item(text: str, at: int, first: bool) -> tuple[Any, int]:
    """The item of a JSON list after position `at` and the position after it; END for the closing bracket."""
    at = WHITESPACE.match(text, at).end()  # type: ignore[union-attr]
    if text.startswith("]", at):
        return END, at + 1
    if not first:
        if not text.startswith(",", at):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = WHITESPACE.match(text, at + 1).end()  # type: ignore[union-attr]
    return DECODER.raw_decode(text, at)


def _json_lines(path: paths.Path, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    broken, begins, found = [], "", False
    for i, line in lines:  # a JSON string may hold U+2028, which is no end of a line here
        if line.strip():
            begins = begins or line.strip()[:40]
            try:
                row = Row(json.loads(line), f"line {i}")
            except (ValueError, RecursionError) as error:
                broken.append((f"line {i}", f"not valid JSON ({error})"))
                continue
            found = True
            if not broken:
                yield row
    if broken and not found:
        inside = "; where its records are a list inside an object, write that list alone" if begins[0] == "{" else ""
        raise UserError(
            f"{path} is neither a JSON list nor JSON lines ({': '.join(broken[0])}; it begins {begins!r}): write one record per "
            f"line, or give it the ending of what it is ({', '.join(SUFFIXES)}){inside}"
        )
    refuse(path, broken)
