"""Files of records: read as they are, refused by name when they are broken."""

import json

import pytest

from lowrank.data.records import read_records
from lowrank.errors import UserError


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_list_and_lines_hold_the_same_records(tmp_path):
    records = [{"instruction": "a", "input": None, "output": "b"}, {"instruction": "c\u2028d", "output": ""}]
    listed = read_records(write(tmp_path, "a.json", json.dumps(records)), "alpaca")
    # U+2028 unescaped in a line, a blank line, a byte order mark and Windows line ends are all found in the wild
    lines = "\ufeff" + "\r\n\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    lined = read_records(write(tmp_path, "a.jsonl", lines), "alpaca")
    assert [record.fields for record in listed] == [record.fields for record in lined] == records
    assert [record.where for record in listed] == ["item 1", "item 2"]
    assert [record.where for record in lined] == ["line 1", "line 3"]


def test_a_text_file_holds_documents_parted_by_blank_lines(tmp_path):
    path = write(tmp_path, "a.txt", "\n\nOne\n  two\n\n \t\n\nThree\n")
    records = read_records(path, "text")
    assert [(record.fields["text"], record.where) for record in records] == [
        ("One\n  two", "line 3"),
        ("Three", "line 8"),
    ]


def test_text_may_also_come_as_json(tmp_path):
    assert read_records(write(tmp_path, "a.jsonl", '{"text": "a\\n\\nb"}'), "text")[0].fields == {"text": "a\n\nb"}


def test_the_corpora_are_read_whole(shared_data):
    path = shared_data / "corpora" / "tinyshakespeare.txt"
    records = read_records(path, "text")
    assert len(records) == 7222
    lines = [line for record in records for line in record.fields["text"].split("\n")]
    assert lines == [line for line in path.read_text().split("\n") if line.strip()]


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("alpaca", '{"output": "b"}', "line 1: field 'instruction' is missing"),
        ("alpaca", '{"instruction": "a", "output": 3}', "line 1: field 'output' must be text, not a number"),
        ("alpaca", '{"instruction": "a", "input": [], "output": ""}', "line 1: field 'input' must be text, not a list"),
        ("alpaca", '[{"instruction": "a", "output": "b"}, 3]', "item 2: a record is a JSON object, this is a number"),
        ("completion", '{"prompt": "a", "completion": null}', "field 'completion' must be text, not null"),
        ("completion", '{"prompt": "\\ud83d", "completion": ""}', "field 'prompt' holds half a character"),
        ("text", '\n{"text": true}', "line 2: field 'text' must be text, not true or false"),
        ("chat", "{}", "line 1: field 'messages' is missing"),
        ("chat", '{"messages": []}', "field 'messages' must be a list of messages, not empty"),
        ("chat", '{"messages": "hi"}', "field 'messages' must be a list of messages, not text"),
        ("chat", '{"messages": [3]}', r"field 'messages\[0\]' must be an object with role and content, not a number"),
        ("chat", '{"messages": [{"role": "user"}]}', r"field 'messages\[0\].content' is missing"),
        ("chat", '{"messages": [{"role": "bot", "content": ""}]}', "must be one of system, user, assistant, not 'bot'"),
        ("text", '{"text": "a"}\n{"text"', r"line 2: not valid JSON \(Expecting ':' delimiter"),
        ("text", '{\n"data": []\n}', r"neither a JSON list nor JSON lines \(line 1: not valid"),
        ("text", "[" * 100_000, "a.json: not valid JSON"),
        ("text", '[{"text": "a"},\n', "a.json: not valid JSON .*line 2"),
        ("text", "", "holds no records"),
        ("text", "[]", "holds no records"),
        ("text", b'{"text": "a"}\n\xff', "line 2: not UTF-8"),
    ],
)
def test_a_broken_record_is_named(tmp_path, format, content, message):
    path = write(tmp_path, "a.json", content)
    with pytest.raises(UserError, match=message) as error:
        read_records(path, format)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_all_broken_records_are_counted_and_ten_are_shown(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": 1}\n' * 12)
    with pytest.raises(UserError, match=r"line 1: .*; line 10: .*; and 2 more$") as error:
        read_records(path, "text")
    assert "line 11" not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.json cannot be read \(No such file"):
        read_records(tmp_path / "nowhere.json", "text")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_records(tmp_path, "text")
    with pytest.raises(UserError, match="is plain text"):
        read_records(write(tmp_path, "a.txt", "a"), "alpaca")
