"""Files of records: read as they are, refused by name when they are broken."""

import gzip
import importlib
import json

import pytest

from lowrank.data.records import check_messages, read_records
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
        (
            "chat",
            '{"messages": [{"role": "robot", "content": ""}]}',
            "must be one of assistant, .*, user, not 'robot'; say .*\"{'user': 'robot'}\"$",
        ),
        ("chat", '{"messages": [{"rol": "user", "content": ""}]}', r"\(found: rol, content\); .*\"{'role': 'rol'}\"$"),
        (
            "chat",
            '{"messages": [{"role": "user", "content": "Q"}]}',
            "'messages' has no turn of the assistant, so nothing",
        ),
        (
            "alpaca",
            '{"instructon": "a", "output": "b"}',
            "'instruction' is missing .*\"{'instruction': 'instructon'}\"$",
        ),
        (
            "alpaca",
            '{"instruction": "a", "x": "b"}',
            r"'output' is missing \(found: instruction, x\); .*{'output': 'NAME'}",
        ),
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


def test_each_kind_of_mistake_is_shown_once_with_its_places(tmp_path):
    with pytest.raises(UserError, match=r": line 1 \(and 11 more\): field 'text' must be text, not a number$"):
        read_records(write(tmp_path, "a.jsonl", '{"text": 1}\n' * 12), "text")
    lines = '{"text": 1}\n{"text": []}\n{"text": 2}\n' + "".join(f'{{"text": "", "chosen": {i}}}\n' for i in range(12))
    with pytest.raises(
        UserError, match=r"line 1, line 3: .* number; line 2: .* list; line 4 \(and 11 more\): field 'ch"
    ):
        read_records(write(tmp_path, "a.jsonl", lines), "text")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.json cannot be read \(No such file"):
        read_records(tmp_path / "nowhere.json", "text")
    with pytest.raises(UserError, match="holds no file of data"):
        read_records(tmp_path, "text")
    with pytest.raises(UserError, match="is plain text"):
        read_records(write(tmp_path, "a.txt", "a"), "alpaca")
    write(tmp_path, "sg.json", LINES)
    with pytest.raises(UserError, match=r"\(did you mean sg.json\?\)$"):
        read_records(tmp_path / "sgg.json")
    with pytest.raises(
        UserError, match=r"""several files are written as --config.data.train="\('.*/sg.json','.*/a.txt'\)"$"""
    ):
        read_records(f"{tmp_path / 'sg.json'},{tmp_path / 'a.txt'}")
    for address in ("https://huggingface.co/datasets/org/chats", "https://hf.co/org/chats/tree/main"):
        with pytest.raises(UserError, match=r"goes by its name; say org/chats$"):
            read_records(address)


# ---- What people have: the files ---------------------------------------------------------------------------------------

ROWS = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Say hi", "input": "", "output": "Hi."}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def arrow(kind):
    pyarrow = pytest.importorskip("pyarrow")
    table, sink = pyarrow.Table.from_pylist(ROWS), pyarrow.BufferOutputStream()
    if kind == "parquet":
        importlib.import_module("pyarrow.parquet").write_table(table, sink)
    elif kind == "zst":
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(LINES.encode())
    else:
        with (pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", lambda: gzip.compress(LINES.encode())),
        ("a.json", lambda: gzip.compress(json.dumps(ROWS).encode())),  # the content decides
        ("a.csv", lambda: 'instruction,input,output\r\nAdd.,1 2,3\r\n"Say hi",,Hi.\r\n'),
        ("a.csv", lambda: "instruction;input;output\nAdd.;1 2;3\nSay hi;;Hi.\n"),
        ("a.csv", lambda: "instruction\tinput\toutput\nAdd.\t1 2\t3\nSay hi\t\tHi.\n"),
        ("a.tsv", lambda: "instruction,input,output\nAdd.,1 2,3\nSay hi,,Hi.\n"),
        ("a.tsv.gz", lambda: gzip.compress(b"instruction\tinput\toutput\nAdd.\t1 2\t3\nSay hi\t\tHi.\n")),
        ("a.parquet", lambda: arrow("parquet")),
        ("a.arrow", lambda: arrow("file")),
        ("a.arrow", lambda: arrow("stream")),
        ("a.jsonl.zst", lambda: arrow("zst")),
    ],
)
def test_every_kind_of_file_holds_the_same_records(tmp_path, name, content):
    records = read_records(write(tmp_path, name, content()))
    assert [{**record.fields} for record in records] == ROWS


def test_a_folder_and_a_pattern_are_their_files_by_name(tmp_path):
    for number, row in enumerate(ROWS):
        write(tmp_path, f"{number}.jsonl", json.dumps(row))
    write(tmp_path, "notes.md", "x")
    for where in (tmp_path, tmp_path / "*.jsonl"):
        assert [record.fields for record in read_records(where)] == ROWS
    with pytest.raises(UserError, match="no data file matches"):
        read_records(tmp_path / "*.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a,b\n1,2,3\n", "line 2: 3 values for 2 columns"),
        ("a.csv", 'a,b\n"1,2\n', "not valid CSV"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "cannot be unpacked"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as parquet"),
        ("a.csv", "What is it?,It is a.\nWho?,Me.\n", "no format .*; the first line of the file must be its header"),
        (
            "a.xlsx",
            b"PK\x03\x04\x14",
            r"a.xlsx is an archive \(.*.xlsx, .*\): save what it holds as CSV or JSON lines$",
        ),
        ("a.pdf", b"%PDF-1.7", "a.pdf is a PDF: save what it holds"),
        (
            "a.json",
            json.dumps({"version": 1, "data": ROWS}),
            "its records are the list in 'data': write that list alone$",
        ),
        ("a.json", json.dumps({"data": ROWS}, indent=1), "a list inside an object, write that list alone$"),
        (
            "a.json",
            "instruction,output\nAdd,3\n",
            r"neither a JSON list nor JSON lines .*it begins 'instruction,output",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=message) as error:
        read_records(write(tmp_path, name, content))
    assert "\n" not in str(error.value)


# ---- What people have: the fields --------------------------------------------------------------------------------------

QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"type": "function", "function": {"name": "get_x", "arguments": {"a": 1}}}


def read(tmp_path, record, format="auto", **options):
    (found,) = read_records(write(tmp_path, "a.jsonl", json.dumps(record)), format, **options)
    return {name: value for name, value in found.fields.items() if value is not None}


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        ({"question": "x", "answer": "y"}, {"instruction": "x", "output": "y"}),
        ({"instruction": "Q", "context": "C", "response": "R"}, {"instruction": "Q", "input": "C", "output": "R"}),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        ({"prompt": "a", "response": "b"}, {"prompt": "a", "completion": "b"}),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
            {"messages": [{"role": "system", "content": "S"}, QUESTION, ANSWER]},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ANSWER]},
            {"messages": [QUESTION, ANSWER]},
        ),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": "[{}]"},
            {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [{}]},
        ),
        (
            {"messages": [{"from": "function_call", "value": '{"name": "get_x", "arguments": {"a": 1}}'}]},
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [CALL]}]},
        ),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, {"messages": [QUESTION | {"train": False}, ANSWER]}),
        ({"input_ids": [1, 5, 6], "labels": [-100, -100, 6]}, {"input_ids": [1, 5, 6], "labels": [-100, -100, 6]}),
        ({"text": "a", "attention_mask": []}, {"text": "a"}),
    ],
)
def test_the_fields_that_people_have_are_recognized(tmp_path, record, fields):
    assert read(tmp_path, record) == fields


def test_arguments_of_a_call_are_an_object_as_templates_expect_them(tmp_path):
    call = {"type": "function", "function": {"name": "get_x", "arguments": '{"a": 1}'}}
    record = {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert read(tmp_path, record)["messages"][1]["tool_calls"] == [CALL]


def test_columns_name_fields_and_roles(tmp_path):
    assert read(tmp_path, {"q": "x", "a": "y"}, columns={"instruction": "q", "output": "a"}) == {
        "instruction": "x",
        "output": "y",
    }
    record = {"dialog": [{"who": "U", "says": "Q"}, {"who": "B", "says": "A"}]}
    columns = {"messages": "dialog", "role": "who", "content": "says", "user": "U", "assistant": "B"}
    assert read(tmp_path, record, columns=columns) == {"messages": [QUESTION, ANSWER]}
    assert read(tmp_path, {"messages": [QUESTION, ANSWER]}, columns=columns) == {"messages": [QUESTION, ANSWER]}
    swapped = {"instruction": "output", "output": "instruction"}
    assert read(tmp_path, {"instruction": "A", "output": "Q"}, columns=swapped) == {"instruction": "Q", "output": "A"}
    said = r"ignored: ctx$|no record has 'ctxt' of data.columns \(did you mean ctx\?\)$"
    with pytest.warns(UserWarning, match=said) as warned:
        read(tmp_path, {"question": "Q", "answer": "A", "ctx": "C"}, columns={"input": "ctxt"})
    assert len(warned) == 2


CHOSEN = {"prompt": "Q", "chosen": "A", "rejected": "B"}


@pytest.mark.parametrize(
    ("record", "field", "fields"),
    [
        (CHOSEN, "completion", {"prompt": "Q", "completion": "A"}),
        ({"question": "Q", "chosen": "A", "rejected": "B"}, "output", {"instruction": "Q", "output": "A"}),
        ({"chosen": "Q: A", "rejected": "B"}, "text", {"text": "Q: A"}),
        (CHOSEN | {"chosen": [QUESTION, ANSWER]}, "messages", {"messages": [QUESTION, ANSWER]}),
        (
            {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER]},
            "completion",
            {"messages": [QUESTION | {"train": False}, ANSWER]},
        ),
    ],
)
def test_the_chosen_answers_of_preference_data_are_trained_as_its_refusal_says(tmp_path, record, field, fields):
    with pytest.raises(UserError, match=rf"preference data .*, say --config.data.columns=\"{{'{field}': 'chosen'}}\"$"):
        read(tmp_path, record, "auto" if "prompt" in record else "text")
    with pytest.warns(UserWarning, match="ignored: .*rejected"):
        assert read(tmp_path, record, columns={field: "chosen"}) == fields


def test_the_system_message_of_the_config_is_that_of_records_without_one(tmp_path):
    system = {"role": "system", "content": "S"}
    assert read(tmp_path, {"messages": [QUESTION, ANSWER]}, system="S")["messages"] == [system, QUESTION, ANSWER]
    assert read(tmp_path, {"messages": [system, QUESTION, ANSWER]}, system="T")["messages"] == [
        system,
        QUESTION,
        ANSWER,
    ]
    assert read(tmp_path, {"question": "Q", "answer": "A"}, system="S")["system"] == "S"


@pytest.mark.parametrize(
    ("record", "format", "message"),
    [
        (
            {"prompt": "Q", "chosen": "A", "rejected": "B"},
            "auto",
            r"has preference data \(field rejected\), which is not supported",
        ),
        ({"prompt": "Q", "completion": "A", "rejected": "B"}, "auto", "'rejected' is not supported: preference data"),
        ({"messages": [QUESTION], "chosen": "A"}, "auto", "'chosen' is not supported"),
        (
            {"messages": [QUESTION, ANSWER]},
            "alpaca",
            "has the fields messages: those of data.format='chat', not of 'alpaca'",
        ),
        ({"text": "a", "tools": [1]}, "auto", "field 'tools' has no meaning in the text format"),
        (
            {"instruction": "a", "output": "b", "input": "c", "context": "d"},
            "auto",
            "'input' and 'context' both mean input",
        ),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "auto", "'labels' must hold -100 or the id"),
        (
            {"messages": [QUESTION | {"content": [{"type": "image_url"}]}]},
            "auto",
            r"content\[0\]' is image_url: only parts",
        ),
        ({"a": 1}, "auto", "has the fields a, which are those of no format"),
        ({"instructon": "Q", "output": "A"}, "auto", r"; 'instructon' \(did you mean instruction\?\); name them"),
        ({"dialog": [{"who": "U"}]}, "auto", "if 'dialog' is a chat, say .*{'messages': 'dialog'}"),
    ],
)
def test_what_a_format_has_no_meaning_for_is_refused_by_name(tmp_path, record, format, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, record, format)
    assert "\n" not in str(error.value)


def test_a_name_in_columns_that_the_file_has_not_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"data.columns has 'antwrt', which is none of them \(did you mean antwort\?\);"
    ):
        read(tmp_path, {"frage": "Q", "antwort": "A"}, columns={"instruction": "frage", "output": "antwrt"})


def test_a_file_of_the_hub_is_named_by_its_data_set(tmp_path):
    folder = tmp_path / "datasets--org--chats" / "snapshots" / "307a" / "data"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"^org/chats \(data/a.json\) has the fields a,"):
        read_records(write(folder, "a.json", '{"a": 1}'))


def test_a_column_that_no_format_knows_is_named_once(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"question": "x", "answer": "y", "category": "z"}) + "\n")
    with pytest.warns(UserWarning, match="a.jsonl: ignored: category$"):
        read_records(path)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "must be a list of messages, not text"),
        (
            [{"role": "usr", "content": "x"}, {"role": "user"}],
            r"not 'usr'; field 'messages\[1\].content' is missing \(found: role\)",
        ),
        ([], "not empty"),
        ([QUESTION, {"role": "assistant", "content": "x"}], "the last message is the assistant's"),
    ],
)
def test_a_chat_that_cannot_be_answered_is_refused(messages, message):
    with pytest.raises(UserError, match=message):
        check_messages(messages)
    assert check_messages([{"from": "human", "value": "x"}]) == [{"role": "user", "content": "x"}]
