"""Rows from the files that people have: JSON, JSON lines, CSV, TSV, Parquet, Arrow, plain text; each also as .gz or .zst.

One idea: the content decides what a file is, where it can (Parquet, Arrow, gzip and zstd begin with bytes of their own); the
name decides between texts. Parquet, Arrow and .zst need `pyarrow`, the extra `data`.
"""

import csv
import glob
import gzip
import importlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lowrank.data.hub_data import data_files
from lowrank.errors import UserError
from lowrank.files import paths

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".txt")
PACKED = (".gz", ".zst")


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
        found = sorted(file for file in path.iterdir() if _suffix(file) in SUFFIXES)
        if not found:
            raise UserError(f"data folder {path} holds no file of data ({', '.join(SUFFIXES)}); name a file")
        return found
    if not path.exists() and re.search(r"[*?\[]", str(where)):
        found = [paths.path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise UserError(f"no data file matches {where}; name a file, a folder or another pattern")
        return found
    return [path]


def is_text(path: paths.Path) -> bool:
    return _suffix(path) == ".txt"


def read_rows(path: paths.Path, lines: bool = False) -> list[Row]:
    """Every row of a file; UserError for a file that cannot be read, with all broken lines of one of JSON lines.

    Plain text is documents between blank lines, or `lines`.
    """
    content = _unpacked(path)
    if content[:4] == b"PAR1":
        return _table_rows(path, content, "parquet")
    if content[:6] == b"ARROW1" or content[:4] == b"\xff\xff\xff\xff":
        return _table_rows(path, content, "arrow")
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text: save the file as UTF-8") from None
    if is_text(path):
        numbered = [Row({"text": line}, f"line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        return numbered if lines else list(_documents(text))
    if _suffix(path) in (".csv", ".tsv"):
        return list(_separated_rows(path, text, "\t" if _suffix(path) == ".tsv" else ","))
    return _json_list(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)


def refuse(path: paths.PathLike, problems: list[tuple[str, str]]) -> None:
    """One UserError for the first ten of the problems (where, what) and the number of the others, if there are any."""
    if problems:
        shown = "; ".join(f"{where}: {what}" for where, what in problems[:10])
        rest = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{path} has broken records, correct or remove them: {shown}{rest}")


def _suffix(path: paths.Path) -> str:
    """The suffix that says what a file holds, without that of its packing."""
    name = path.name.lower()
    for packing in PACKED:
        name = name.removesuffix(packing)
    return "." + name.rpartition(".")[2] if "." in name else ""


def _unpacked(path: paths.Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"data file {path} cannot be read ({error.strerror}): name a file of data, or a folder"
        ) from None
    try:
        if content[:2] == b"\x1f\x8b":
            return gzip.decompress(content)
        if content[:4] == b"\x28\xb5\x2f\xfd":
            pyarrow = _pyarrow(path)
            return pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd").read()
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be unpacked ({error}): it is truncated or damaged; fetch it again") from None
    return content


def _pyarrow(path: paths.Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install 'lowrank[data]'") from None
    return pyarrow


def _table_rows(path: paths.Path, content: bytes, kind: str) -> list[Row]:
    pyarrow = _pyarrow(path)
    source = pyarrow.BufferReader(content)
    try:
        if kind == "parquet":
            table = importlib.import_module("pyarrow.parquet").read_table(source)
        elif content[:6] == b"ARROW1":
            table = pyarrow.ipc.open_file(source).read_all()
        else:
            table = pyarrow.ipc.open_stream(source).read_all()  # as the cache of `datasets` has it
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as {kind} ({error}): it is truncated or damaged; fetch it again"
        ) from None
    return [Row(fields, f"row {i}") for i, fields in enumerate(table.to_pylist(), 1)]


def _separated_rows(path: paths.Path, text: str, separator: str) -> Iterator[Row]:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
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


def _documents(text: str) -> Iterator[Row]:
    line = 1
    for block in re.split(r"(\n(?:[^\S\n]*\n)+)", text):  # keeps the blank lines, to count lines
        if block.strip():
            first = line + len(block) - len(block.lstrip("\n"))
            yield Row({"text": block.strip("\n")}, f"line {first}")
        line += block.count("\n")


def _json_list(path: paths.Path, text: str) -> list[Row]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}): correct it, or write one record per line") from None
    return [Row(item, f"item {i}") for i, item in enumerate(items, 1)]


def _json_lines(path: paths.Path, text: str) -> list[Row]:
    rows, broken = [], []
    for i, line in enumerate(text.split("\n"), 1):  # not splitlines(): a JSON string may hold U+2028
        if line.strip():
            try:
                rows.append(Row(json.loads(line), f"line {i}"))
            except (ValueError, RecursionError) as error:
                broken.append((f"line {i}", f"not valid JSON ({error})"))
    if broken and not rows:
        found = f"it begins {text.strip()[:40]!r}"
        raise UserError(
            f"{path} is neither a JSON list nor JSON lines ({': '.join(broken[0])}; {found}): write one record per line, or "
            f"give it the ending of what it is ({', '.join(SUFFIXES)})"
        )
    refuse(path, broken)
    return rows
