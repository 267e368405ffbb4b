"""Read files of records (JSON lists, JSON lines, plain text) and check every field.

One idea: a broken record is found before anything is computed, and named by file, line (or item of the list, from 1) and
field; all of them at once. Left out: columns other than the format's own, which are ignored.
"""

import dataclasses
import json
import re
from collections.abc import Iterator

from lowrank.data.hub_data import data_files
from lowrank.errors import UserError
from lowrank.files import paths

ROLES = ("system", "user", "assistant")
REQUIRED = {"alpaca": ("instruction", "output"), "completion": ("prompt", "completion"), "text": ("text",)}


@dataclasses.dataclass(frozen=True)
class Record:
    """A checked record and its place: `line 7` of a file of lines or text, `item 7` of a list."""

    fields: dict
    where: str


def read_records(where: paths.PathLike, format: str) -> list[Record]:
    """Every record of a file. `.txt` holds documents separated by blank lines (format `text`), any other file JSON."""
    if (found := data_files(where)) is not None:
        return [record for file in found for record in read_records(file, format)]
    path = paths.path(where)
    text = _read_text(path)
    if path.suffix == ".txt":
        if format != "text":
            raise UserError(f"{path} is plain text, not JSON for data.format={format!r}: use data.format='text'")
        records = list(_documents(text))
    elif text.lstrip().startswith("["):
        try:
            records = [Record(item, f"item {i}") for i, item in enumerate(json.loads(text), 1)]
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({error}): correct it, or write one record per line") from None
    else:
        records = _json_lines(path, text)
    if not records:
        raise UserError(f"{path} holds no records: give it at least one")
    refuse(path, [(r.where, problem) for r in records for problem in _problems(r.fields, format)])
    return records


def refuse(path: paths.PathLike, problems: list[tuple[str, str]]) -> None:
    """One UserError for the first ten of the problems (where, what) and the number of the others, if there are any."""
    if problems:
        shown = "; ".join(f"{where}: {what}" for where, what in problems[:10])
        rest = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{path} has broken records, correct or remove them: {shown}{rest}")


def _read_text(path: paths.Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"data file {path} cannot be read ({error.strerror}): name a JSON or .txt file") from None
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text: save the file as UTF-8") from None


def _documents(text: str) -> Iterator[Record]:
    line = 1
    for block in re.split(r"(\n(?:[^\S\n]*\n)+)", text):  # keeps the blank lines, to count lines
        if block.strip():
            first = line + len(block) - len(block.lstrip("\n"))
            yield Record({"text": block.strip("\n")}, f"line {first}")
        line += block.count("\n")


def _json_lines(path: paths.Path, text: str) -> list[Record]:
    records, broken = [], []
    for i, line in enumerate(text.split("\n"), 1):  # not splitlines(): a JSON string may hold U+2028
        if line.strip():
            try:
                records.append(Record(json.loads(line), f"line {i}"))
            except (ValueError, RecursionError) as error:
                broken.append((f"line {i}", f"not valid JSON ({error})"))
    if broken and not records:
        raise UserError(f"{path} is neither a JSON list nor JSON lines ({': '.join(broken[0])}): one record per line")
    refuse(path, broken)
    return records


def _problems(fields: object, format: str) -> Iterator[str]:
    """What is wrong with a record of this format, field by field."""
    if not isinstance(fields, dict):
        yield f"a record is a JSON object, this is {_kind(fields)}"
    elif format == "chat":
        yield from _chat_problems(fields)
    else:
        for name in REQUIRED[format]:
            yield from _string_problems(fields, name, name)
        if format == "alpaca" and fields.get("input") is not None:  # may be missing or null
            yield from _string_problems(fields, "input", "input")


def _chat_problems(fields: dict) -> Iterator[str]:
    messages = fields.get("messages")
    if "messages" not in fields:
        yield "field 'messages' is missing"
    elif not isinstance(messages, list) or not messages:
        yield f"field 'messages' must be a list of messages, not {_kind(messages) if messages else 'empty'}"
    else:
        for i, message in enumerate(messages):
            if not isinstance(message, dict):
                yield f"field 'messages[{i}]' must be an object with role and content, not {_kind(message)}"
                continue
            yield from _string_problems(message, "content", f"messages[{i}].content")
            if message.get("role") not in ROLES:
                yield f"field 'messages[{i}].role' must be one of {', '.join(ROLES)}, not {message.get('role')!r}"


def _string_problems(fields: dict, name: str, path: str) -> Iterator[str]:
    if name not in fields:
        yield f"field '{path}' is missing"
    elif not isinstance(fields[name], str):
        yield f"field '{path}' must be text, not {_kind(fields[name])}"
    elif re.search("[\ud800-\udfff]", fields[name]):
        yield f"field '{path}' holds half a character (a lone surrogate such as \\ud83d)"


def _kind(value: object) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
