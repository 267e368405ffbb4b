"""Records: the rows of files, checked, in the fields of one of five formats.

One idea: a broken record is found before anything is computed, and named by file, line (item of a list, row of a table) and
field; all of them at once. A field that means something is understood or refused by name, never passed over; a column that no
format knows is named once.

    alpaca      instruction, output; input, system, history ([[instruction, output], ...]) may be missing
    chat        messages ([{role, content}, ...]), tools; or ShareGPT's conversations ([{from, value}, ...])
    completion  prompt, completion
    text        text, or a .txt file of documents between blank lines
    tokens      input_ids; labels (-100: not trained) may be missing

`ALIASES` are other people's names for these fields; `columns` gives more of them ({"instruction": "question"}).
"""

import difflib
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lowrank.data import files
from lowrank.data.files import refuse
from lowrank.data.hub_data import shown_name
from lowrank.errors import UserError, meant
from lowrank.files import paths

FORMATS = ("alpaca", "chat", "completion", "text", "tokens")

FIELDS = {  # of each format: those that must be there, and those that may be missing or null
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "chat": (("messages",), ("tools", "system")),
    "completion": (("prompt", "completion"), ()),
    "text": (("text",), ()),
    "tokens": (("input_ids",), ("labels", "attention_mask")),
}
ALIASES = {
    "instruction": ("question",),
    "input": ("context",),
    "output": ("response", "answer"),
    "prompt": ("question",),
    "completion": ("response", "answer"),
    "messages": ("conversations", "conversation"),
    "system": ("system_prompt",),
    "role": ("from",),
    "content": ("value",),
}
PREFERENCE = "preference data"
NOT_SUPPORTED = {  # what a column of this name asks for, which no format here has
    **dict.fromkeys(("chosen", "rejected", "kto_tag"), PREFERENCE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "images, video and sound"),
    "chat_template_kwargs": "arguments of the chat template",
}
FIELDS_OF_MESSAGES = ("role", "content")
ROLES = {  # other people's names for the roles of OpenAI's messages
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function"), "tool"),
}
NAMES = tuple(
    dict.fromkeys(
        [*(field for names in FIELDS.values() for field in names[0] + names[1]), *FIELDS_OF_MESSAGES, *ROLES.values()]
    )
)
OF_RECORDS = {field for names in FIELDS.values() for field in names[0] + names[1]}
KNOWN = {name for field in OF_RECORDS for name in (field, *ALIASES.get(field, ()))}
# Alpaca has its whole prompt in `text`, too, and chats often have theirs in `prompt`: those two are ignored.
MEANING = KNOWN - {"text", "prompt"}
Columns = Mapping[str, str]
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    """The fields of a checked record, its place in its file, and its format."""

    fields: dict
    where: str
    format: str = ""


def read_records(
    where: paths.PathLike, format: str = "auto", columns: Columns | None = None, system: str | None = None
) -> list[Record]:
    """Every record of a file (a folder, a pattern), in the fields of its format. "auto": as `find_format` has it.

    `columns`: the names that fields (and roles) have in the file. `system`: the system message of a record without one.
    """
    return list(iterate_records(where, format, columns, system))


def iterate_records(
    where: paths.PathLike, format: str = "auto", columns: Columns | None = None, system: str | None = None
) -> Iterator[Record]:
    """`read_records`, one at a time. UserError for a file's broken records comes at that file's end."""
    for path in files.find_files(str(where)):
        try:
            rows = files.read_rows(path)
            if (first := next(rows, None)) is None:
                raise UserError(f"{path} holds no records: give it at least one")
            own = find_format(path, first, columns) if format == "auto" else format
            yield from _checked_rows(path, itertools.chain([first], rows), first, own, columns or {}, system)
        except UserError as error:
            raise UserError(str(error).replace(str(path), shown_name(path))) from None


def find_format(path: paths.Path, row: files.Row, columns: Columns | None = None) -> str:
    """The format whose fields a row has."""
    fields = row.fields
    if not isinstance(fields, dict):
        raise UserError(f"{path}, {row.where}: a record is a JSON object, this is {_kind(fields)}")
    found = _recognized(fields, columns)
    asked = {NOT_SUPPORTED[name]: name for name in fields if name in NOT_SUPPORTED}
    if found is None and asked:
        what = f"{' and '.join(asked)} (field {', '.join(asked.values())}), which is not supported"
        raise UserError(f"{path} has {what}{_with_chosen(fields)}")
    if found is None:
        having = "; ".join(f"{name}: {', '.join(FIELDS[name][0])}" for name in FORMATS)
        found_here = f"{path} has the fields {', '.join(fields) or '(none)'}, which are those of no format ({having})"
        raise UserError(f"{found_here}; {_remedy(path, fields, columns or {})}")
    return found


def _with_chosen(fields: dict) -> str:
    """What to do with preference data of these fields."""
    chosen, prompt = fields.get("chosen"), fields.get("prompt")
    if "chosen" not in fields:
        return "; remove it"
    if isinstance(chosen, list) and not isinstance(prompt, list):
        field = "messages"
    else:
        field = "completion" if prompt else "output" if {"question", "instruction"} & fields.keys() else "text"
    return f"; to train on the chosen answers, say --config.data.columns=\"{{'{field}': 'chosen'}}\""


def _remedy(path: paths.Path, fields: dict, columns: Columns) -> str:
    """What to do about a file whose fields are those of no format."""
    for name, value in fields.items():
        if name not in KNOWN and isinstance(value, list) and value and isinstance(value[0], dict):
            if _recognized(value[0], columns):
                return f"its records are the list in '{name}': write that list alone"
            return f"if '{name}' is a chat, say --config.data.columns=\"{{'messages': '{name}'}}\""
    absent = {name for field, name in columns.items() if field in OF_RECORDS and name not in fields}
    hints = [f"data.columns has '{name}', which is none of them{meant(name, fields)}" for name in sorted(absent)]
    hints = hints or [f"'{name}'{close}" for name in fields if name not in KNOWN and (close := meant(name, KNOWN))]
    if not hints and files.suffix(path) in files.SEPARATORS:
        hints = ["the first line of the file must be its header"]
    hints += ["name them by --config.data.columns, such as \"{'instruction': 'question'}\""]
    return "; ".join(hints)


def _recognized(fields: dict, columns: Columns | None) -> str | None:
    if isinstance(fields.get("prompt"), list) and fields.keys() & {*_names("completion", columns)}:
        return "chat"
    having = [name for name in ("chat", "tokens", "alpaca", "completion", "text") if _has_all(fields, name, columns)]
    return having[0] if having else None


def _has_all(fields: dict, format: str, columns: Columns | None) -> bool:
    return all(any(name in fields for name in _names(field, columns)) for field in FIELDS[format][0])


def _names(field: str, columns: Columns | None) -> tuple[str, ...]:
    """What a field may be called: as `columns` has it, or by a name of its own that `columns` gives no other."""
    given = {field: columns[field]} if columns and field in columns else {}
    taken = columns.values() if columns else ()
    return (*given.values(), *(name for name in (field, *ALIASES.get(field, ())) if name not in taken))


def _checked_rows(path, rows, first, format: str, columns: Columns, system: str | None) -> Iterator[Record]:
    if files.is_text(path) and format != "text":
        raise UserError(f"{path} is plain text, not JSON for data.format={format!r}: use data.format='text'")
    is_other = isinstance(first.fields, dict) and not _has_all(first.fields, format, columns)
    if is_other and (other := _recognized(first.fields, columns)) not in (None, format):
        raise UserError(
            f"{path} has the fields {', '.join(first.fields)}: those of data.format={other!r}, not of {format!r}; say that, or 'auto'"
        )
    if is_other and "chosen" in first.fields:
        find_format(path, first, columns)  # which refuses it
    problems, ignored = [], dict[str, None]()
    names = {field: _names(field, columns) for field in sum(FIELDS[format], ())}
    unseen = {field: own for field, own in names.items() if field in columns}
    for row in rows:
        found: list[str] = []
        if unseen and isinstance(row.fields, dict):
            unseen = {field: own for field, own in unseen.items() if not row.fields.keys() & {*own}}
        fields = _checked(row.fields, format, names, columns, system, found, ignored)
        problems += [(row.where, problem) for problem in found]
        if not problems:
            yield Record(fields, row.where, format)
    refuse(path, problems)
    if ignored:
        warnings.warn(f"{shown_name(path)}: ignored: {', '.join(ignored)}", stacklevel=2)
    for own in unseen.values():
        what = f"no record has '{own[0]}' of data.columns{meant(own[0], ignored)}"
        warnings.warn(f"{shown_name(path)}: {what}", stacklevel=2)


# ---- One record --------------------------------------------------------------------------------------------------------


def _checked(row: Any, format: str, names, columns, system, problems: list[str], ignored: dict) -> dict:
    """The fields of a row under their own names (`names`: what each may be called). What is wrong joins `problems`, columns
    without a meaning `ignored`."""
    if not isinstance(row, dict):
        problems.append(f"a record is a JSON object, this is {_kind(row)}")
        return {}
    if format == "chat" and isinstance(row.get("prompt"), list) and not row.keys() & {*names["messages"]}:
        row = _joined(row, _names("completion", columns), problems)
    fields, used = {}, set()
    for field, own in names.items():
        known = [name for name in own if name in row][: 1 if field in columns else None]
        present = [name for name in known if row[name] not in (None, "", [])] if len(known) > 1 else known
        if len(present) > 1:
            problems.append(f"fields {' and '.join(map(repr, present))} both mean {field}; remove one")
        used.update(known)
        if known:
            fields[field] = row[(present or known)[0]]
        elif field in FIELDS[format][0]:
            problems.append(_missing(own[0], field, row, sum(names.values(), ())))
    rest = {name: value for name, value in row.items() if name not in used and value not in (None, "", [], {})}
    for name in rest:
        if NOT_SUPPORTED.get(name) == PREFERENCE and "chosen" in columns.values():
            ignored[name] = None
        elif name in NOT_SUPPORTED:
            problems.append(f"field '{name}' is not supported: {NOT_SUPPORTED[name]}; remove it")
        elif name in MEANING:
            problems.append(
                f"field '{name}' has no meaning in the {format} format; remove it, or choose another data.format"
            )
        else:
            ignored[name] = None
    if not problems:
        _CHECKS[format](fields, columns, problems)
    if not problems and system:
        _add_system(fields, format, system)
    return fields


def _missing(name: str, field: str, row: dict, known: Iterable[str], place: str = "") -> str:
    """That a field is missing; where the row has names that are not known, how to say that one of them is the field."""
    others = [other for other in row if other not in known]
    close = difflib.get_close_matches(name, others, n=1) or ["NAME"]
    remedy = (
        f"; if it goes by another name, say --config.data.columns=\"{{'{field}': '{close[0]}'}}\"" if others else ""
    )
    return f"field '{place}{name}' is missing (found: {', '.join(row) or '(none)'}){remedy}"


def _joined(row: dict, names: tuple[str, ...], problems: list[str]) -> dict:
    """TRL's prompt and completion (`names`) of messages as one chat, of which the completion is trained."""
    own = next((name for name in names if name in row), "completion")
    completion = row.get(own)
    if not isinstance(completion, list):
        problems.append(f"field 'completion' must be a list of messages as 'prompt' is, not {_kind(completion)}")
        return row
    before = [message | {"train": False} if isinstance(message, dict) else message for message in row["prompt"]]
    rest = {name: value for name, value in row.items() if name not in ("prompt", own)}
    return {"messages": before + completion, **rest}


def _add_system(fields: dict, format: str, system: str) -> None:
    if format == "alpaca":
        fields["system"] = fields.get("system") or system
    elif format == "chat" and fields["messages"][0]["role"] not in ("system", "developer"):
        fields["messages"].insert(0, {"role": "system", "content": system})


def _check_alpaca(fields: dict, columns: Columns, problems: list[str]) -> None:
    for name in ("instruction", "output", *(name for name in ("input", "system") if fields.get(name) is not None)):
        problems += _text_problems(fields[name], name)
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in history
    ):
        problems.append("field 'history' must be a list of [instruction, output]")


def _check_texts(fields: dict, columns: Columns, problems: list[str]) -> None:
    for name, value in fields.items():
        problems += _text_problems(value, name)


def _check_tokens(fields: dict, columns: Columns, problems: list[str]) -> None:
    ids = fields["input_ids"] = _parsed(fields["input_ids"])
    labels = fields["labels"] = _parsed(fields.get("labels")) or ids
    for name in ("input_ids", "labels"):
        if not isinstance(fields[name], list) or not all(type(item) is int for item in fields[name]):
            problems.append(f"field '{name}' must be a list of token ids")
            return
    if len(ids) < 2 or min(ids) < 0:
        problems.append("field 'input_ids' must hold two or more token ids, none of them negative")
    if len(labels) != len(ids):
        problems.append(f"field 'labels' has {len(labels)} items and 'input_ids' {len(ids)}")
    elif any(label not in (-100, i) for label, i in zip(labels, ids, strict=True)):
        problems.append("field 'labels' must hold -100 or the id at the same place in 'input_ids'")
    mask = _parsed(fields.pop("attention_mask", None))
    if mask is not None and not all(item == 1 for item in mask):
        problems.append("field 'attention_mask' masks ids; leave padding out of 'input_ids'")


def _check_answered_chat(fields: dict, columns: Columns, problems: list[str]) -> None:
    _check_chat(fields, columns, problems)
    if not problems and not any(message["role"] == "assistant" for message in fields["messages"]):
        problems.append("field 'messages' has no turn of the assistant, so nothing to learn")


def _check_chat(fields: dict, columns: Columns | None, problems: list[str]) -> None:
    """`columns` is None for a chat that is not in a file of data."""
    messages = _parsed(fields["messages"])
    if not isinstance(messages, list) or not messages:
        problems.append(f"field 'messages' must be a list of messages, not {_kind(messages) if messages else 'empty'}")
        return
    fields["messages"] = [_message(message, f"messages[{i}]", columns, problems) for i, message in enumerate(messages)]
    if system := fields.pop("system", None):
        problems += _text_problems(system, "system")
        if fields["messages"][0].get("role") == "system":
            problems.append("field 'system' and the first of 'messages' are both the system's message; remove one")
        fields["messages"].insert(0, {"role": "system", "content": system})
    fields["tools"] = tools = _parsed(fields.get("tools"))
    if tools and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        problems.append(f"field 'tools' must be a list of objects, not {_kind(tools)}")


def _message(message: Any, place: str, columns: Columns | None, problems: list[str]) -> dict:
    """A message with OpenAI's names of fields and roles, its content as text and its calls' arguments as objects."""
    if not isinstance(message, dict):
        problems.append(f"field '{place}' must be an object with role and content, not {_kind(message)}")
        return {}
    renamed = {
        next((name for name in _names(field, columns) if name in message), field): field for field in FIELDS_OF_MESSAGES
    }
    found = message
    message = {
        renamed.get(name, name): value for name, value in message.items() if value is not None or name in renamed
    }
    roles = ROLES | {columns[role]: role for role in set(ROLES.values()) if columns and role in columns}
    known = found if columns is None else renamed
    said, role = message.get("role"), None
    if "role" not in message:
        problems.append(_missing("role", "role", found, known, f"{place}."))
    elif not isinstance(said, str):
        problems += _text_problems(said, f"{place}.role")
    elif (role := roles.get(said)) is None:
        remedy = f"; say which it is, such as --config.data.columns=\"{{'user': {said!r}}}\""
        choices = ", ".join(sorted(set(roles.values())))
        problems.append(
            f"field '{place}.role' must be one of {choices}, not {said!r}{remedy if columns is not None else ''}"
        )
    message["role"] = role
    if said == "function_call":
        message["tool_calls"], message["content"] = [_parsed(message.get("content"))], ""
    if isinstance(message.get("content"), list):
        message["content"] = _joined_parts(message["content"], place, problems)
    if calls := _parsed(message.get("tool_calls")):
        if isinstance(calls, list) and all(isinstance(call, dict) for call in calls):
            message["tool_calls"] = [_call(call) for call in calls]
        else:
            problems.append(f"field '{place}.tool_calls' must be a list of objects, not {_kind(calls)}")
    if calls and message.get("content") is None:
        message["content"] = ""
    elif "content" not in message:
        problems.append(_missing("content", "content", found, known, f"{place}."))
    else:
        problems += _text_problems(message["content"], f"{place}.content")
    return message


def _joined_parts(parts: list, place: str, problems: list[str]) -> str:
    texts = []
    for i, part in enumerate(parts):
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if isinstance(text, str) and (isinstance(part, str) or part.get("type", "text") == "text"):
            texts.append(text)
        else:
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            problems.append(f"field '{place}.content[{i}]' is {kind}: only parts of the type text are supported")
    return "".join(texts)


def _call(call: dict) -> dict:
    """A call of a tool with its arguments as an object, as chat templates expect them; OpenAI has them as JSON in a text."""
    function = call.get("function", call)
    if not isinstance(function, dict):
        return call
    function = function | {"arguments": _parsed(function.get("arguments", {}))}
    return call | {"function": function} if "function" in call else {"type": "function", "function": function}


def _parsed(value: Any) -> Any:
    """The list or object in a text of JSON, as tables hold them; any other value as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def _text_problems(value: Any, place: str) -> list[str]:
    if not isinstance(value, str):
        return [f"field '{place}' must be text, not {_kind(value)}"]
    if not value.isascii() and HALF_CHARACTER.search(value):
        return [f"field '{place}' holds half a character (a lone surrogate such as \\ud83d)"]
    return []


def _kind(value: object) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


_CHECKS = {
    "alpaca": _check_alpaca,
    "chat": _check_answered_chat,
    "completion": _check_texts,
    "text": _check_texts,
    "tokens": _check_tokens,
}


def check_messages(messages: Any, tools: list | None = None) -> list[dict]:
    """A chat to be answered, with OpenAI's names of fields and roles; UserError for all that is wrong with it."""
    fields, problems = {"messages": messages, "tools": tools}, list[str]()
    _check_chat(fields, None, problems)
    if not problems and fields["messages"][-1]["role"] == "assistant":
        problems.append("the last message is the assistant's: there is nothing to answer")
    if problems:
        raise UserError("; ".join(problems))
    return fields["messages"]
