"""Files of records: JSON lists, JSON lines and plain text, read whole and checked field by field.

One idea: a broken record is found here, before anything is computed, and is named by file, line (or item of the
list, counted from 1) and field; all of them are named at once. Left out: other columns than a format's own,
which are ignored, and downloading.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator

from lowrank.errors import UserError
from lowrank.files import paths

ROLES = ("system", "user", "assistant")
REQUIRED = {"alpaca": ("instruction", "output"), "completion": ("prompt", "completion"), "text": ("text",)}
OPTIONAL = {"alpaca": ("input",)}  # missing and null both mean: none


@dataclasses.dataclass(frozen=True)
class Record:
    """One checked record, and where it stands: `line 7` of a file of lines or text, `item 7` of a list."""

    fields: dict
    where: str


def read_records(path: str | pathlib.Path, format: str) -> list[Record]:
    """Every record of a file. `.txt` holds documents parted by blank lines (format `text`), anything else JSON."""
    path = paths.path(path)
    text = _read_text(path)
    if path.suffix == ".txt":
        if format != "text":
            raise UserError(
                f"{path} is plain text, not JSON records for data.format={format!r}: use data.format='text'"
            )
        records = list(_documents(text))
    else:
        records = _json_list(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)
    if not records:
        raise UserError(f"{path} holds no records: put at least one into it")
    refuse(path, [(r.where, problem) for r in records for problem in _problems(r.fields, format)])
    return records


def refuse(path: str | pathlib.Path, problems: list[tuple[str, str]]) -> None:
    """Raise one UserError that lists the first ten problems (where, what) and the number of all, if there are any."""
    if problems:
        shown = "; ".join(f"{where}: {what}" for where, what in problems[:10])
        rest = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{path} has broken records, mend or remove them: {shown}{rest}")


def _read_text(path: pathlib.Path) -> str:
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
    for block in re.split(r"(\n(?:[^\S\n]*\n)+)", text):  # blank lines, kept so that lines can be counted
        if block.strip():
            first = line + len(block) - len(block.lstrip("\n"))
            yield Record({"text": block.strip("\n")}, f"line {first}")
        line += block.count("\n")


def _json_list(path: pathlib.Path, text: str) -> list[Record]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}): mend it, or write one record a line") from None
    return [Record(item, f"item {i}") for i, item in enumerate(items, 1)]


def _json_lines(path: pathlib.Path, text: str) -> list[Record]:
    records, broken = [], []
    for i, line in enumerate(text.split("\n"), 1):  # not splitlines(): a JSON string may hold U+2028 and its like
        if line.strip():
            try:
                records.append(Record(json.loads(line), f"line {i}"))
            except (ValueError, RecursionError) as error:
                broken.append((f"line {i}", f"not valid JSON ({error})"))
    if broken and not records:
        raise UserError(
            f"{path} is neither a JSON list nor JSON lines ({': '.join(broken[0])}): write one record a line"
        )
    refuse(path, broken)
    return records


def _problems(fields: object, format: str) -> Iterator[str]:
    """What keeps a record from being one of its format, field by field."""
    if not isinstance(fields, dict):
        yield f"a record is a JSON object, this is {_kind(fields)}"
    elif format == "chat":
        yield from _chat_problems(fields)
    else:
        for name in REQUIRED[format]:
            yield from _string_problems(fields, name, name)
        for name in OPTIONAL.get(format, ()):
            if fields.get(name) is not None:
                yield from _string_problems(fields, name, name)


def _chat_problems(fields: dict) -> Iterator[str]:
    messages = fields.get("messages")
    if "messages" not in fields:
        yield "field 'messages' is missing"
    elif not isinstance(messages, list) or not messages:
        yield f"field 'messages' must be a list of messages, not {_kind(messages) if messages else 'empty'}"
    else:
        for i, message in enumerate(messages):
            name = f"messages[{i}]"
            if not isinstance(message, dict):
                yield f"field '{name}' must be an object with role and content, not {_kind(message)}"
                continue
            yield from _string_problems(message, "content", f"{name}.content")
            if message.get("role") not in ROLES:
                yield f"field '{name}.role' must be one of {', '.join(ROLES)}, not {message.get('role')!r}"


def _string_problems(fields: dict, name: str, path: str) -> Iterator[str]:
    if name not in fields:
        yield f"field '{path}' is missing"
    elif not isinstance(fields[name], str):
        yield f"field '{path}' must be text, not {_kind(fields[name])}"
    elif not _is_unicode(fields[name]):
        yield f"field '{path}' holds half a character (a lone surrogate such as \\ud83d)"


def _is_unicode(text: str) -> bool:
    try:
        return text.encode() is not None
    except UnicodeEncodeError:
        return False


def _kind(value: object) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
