"""Tokens that are written once: the same examples as those encoded in memory, from a disk or a bucket, by one process or several."""

import contextlib
import json
import os

import numpy as np
import pytest

from lowrank.data import cache, examples, files
from lowrank.data.cache import Data, read_examples
from lowrank.data.examples import count_contained, split
from lowrank.data.loader import TrainLoader, epoch_lengths
from lowrank.errors import UserError
from lowrank.files import bucket_lock, paths
from lowrank.parallel import distributed

ARRAYS = ("ids", "trained", "bounds", "record", "truncated", "targets")


def write(folder, name, texts, **more):
    file = folder / name
    file.write_text("".join(json.dumps({"prompt": text, "completion": text[::-1], **more}) + "\n" for text in texts))
    return str(file)


def data(*sources, max_length=8):
    return Data(sources, "auto", {}, None, max_length, False, "truncate")


def assert_same(found, expected):
    assert (found.dropped, found.sources) == (expected.dropped, expected.sources)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found.examples, name), getattr(expected.examples, name), err_msg=name)


@pytest.fixture
def blocks_of_two(monkeypatch):
    monkeypatch.setattr(examples, "BLOCK", 2)


def test_tokens_are_encoded_once(tmp_path, char_tokenizer, monkeypatch, blocks_of_two):
    tokenizer = char_tokenizer()
    both = data(
        write(tmp_path, "a.jsonl", ["ab", "c" * 20, "de", "f", "gh"], id=1), write(tmp_path, "b.jsonl", "ijk", id=1)
    )
    with pytest.warns(UserWarning, match="ignored: id"):
        format, expected = read_examples(both, tokenizer, None)
    assert (format, expected.dropped, expected.truncated, expected.sources) == ("completion", 1, 0, (4, 3))
    with pytest.warns(UserWarning, match="ignored: id"):
        assert_same(read_examples(both, tokenizer, tmp_path / "tokens")[1], expected)
    monkeypatch.setattr(cache, "encode_blocks", None)  # nothing is encoded from here on
    with pytest.warns(UserWarning, match="ignored: id") as notes:  # what was said the first time is said again
        format, again = read_examples(both, tokenizer, tmp_path / "tokens")
    assert (format, len(notes)) == ("completion", 2)
    assert_same(again, expected)
    assert again.examples.ids.dtype == np.uint16  # of a small vocabulary
    assert again.examples[1].ids.dtype == np.int32
    (entry,) = (tmp_path / "tokens").iterdir()
    whole = (entry / "ids").read_bytes()
    for name, damaged in (("ids", b""), ("ids", bytes([whole[0] ^ 1]) + whole[1:]), ("meta.json", b"{")):
        before = (entry / name).read_bytes()
        (entry / name).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"are damaged \({name}\): remove that folder"):
            read_examples(both, tokenizer, tmp_path / "tokens")
        (entry / name).write_bytes(before)


def test_an_entry_is_for_this_data_this_tokenizer_and_these_settings(tmp_path, char_tokenizer):
    file = write(tmp_path, "a.jsonl", "abc")
    names = {cache._entry_name(made, char_tokenizer()) for made in (data(file), data(file, max_length=9))}
    names.add(cache._entry_name(data(file), char_tokenizer(eos_token="b")))
    write(tmp_path, "a.jsonl", "abd")
    names.add(cache._entry_name(data(file), char_tokenizer()))
    assert len(names) == 4
    copy = write(tmp_path, "copy.jsonl", "abd")  # by content, not by name
    assert cache._entry_name(data(copy), char_tokenizer()) in names


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_several_processes_encode_a_share_each(place, tmp_path, char_tokenizer, monkeypatch, blocks_of_two, bucket):
    tokenizer, made = char_tokenizer(), data(write(tmp_path, "a.jsonl", "abcdefghi"))
    expected = read_examples(made, tokenizer, None)[1]
    entry = paths.path("gs://bucket/tokens" if place == "bucket" else tmp_path / "tokens") / "entry"
    encoded = []
    plain = examples._encode
    monkeypatch.setattr(examples, "_encode", lambda block, *rest: encoded.append(len(block)) or plain(block, *rest))
    for process in (1, 2, 0):  # one after the other, the first process last, as the barrier has it
        monkeypatch.setattr(distributed, "place", lambda process=process: (process, 3))
        monkeypatch.setattr(distributed, "is_first", lambda process=process: process == 0)
        encoded.clear()
        cache._write(entry, made, tokenizer)
        assert sum(encoded) == {0: 4, 1: 3, 2: 2}[process]  # of blocks of 2, 2, 2, 2, 1
    for _ in range(2):
        opened = entry if place == "disk" else cache._joined_here(entry)
        assert_same(cache._open(opened, made)[1], expected)
    assert place == "bucket" or [path.name for path in entry.parent.iterdir()] == ["entry"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, char_tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"tokens .*file/tokens cannot be written .*Not a directory.*--config.data.cache"
    ):
        read_examples(data(write(tmp_path, "a.jsonl", "abc")), char_tokenizer(), tmp_path / "file" / "tokens")


def test_what_is_broken_is_found_before_anything_is_kept(tmp_path, char_tokenizer, blocks_of_two):
    file = write(tmp_path, "a.jsonl", "abcdef")
    with open(file, "a") as stream:
        stream.write('{"prompt": 3, "completion": ""}\n{"prompt": ""}\n')
    with pytest.raises(UserError, match=r"line 7: .*; line 8: "):
        read_examples(data(file), char_tokenizer(), tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path, char_tokenizer):
    for name, process in (("a.dead", "999999999"), ("a.alive", str(os.getpid()))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "writer.json").write_text(json.dumps(bucket_lock.this_process() | {"process": process}))
    shown = []
    counting = lambda what: contextlib.nullcontext(lambda done: shown.append((what, done)))  # noqa: E731
    read_examples(data(write(tmp_path, "a.jsonl", "abc")), char_tokenizer(), tmp_path, counting)
    assert shown == [("records", 2000)]
    assert not (tmp_path / "a.dead").exists() and (tmp_path / "a.alive").exists()


def test_sources_of_two_formats_are_refused(tmp_path, char_tokenizer):
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="of the formats completion, text; give those of one format"):
        read_examples(data(write(tmp_path, "a.jsonl", "a"), str(tmp_path / "b.jsonl")), char_tokenizer(), None)


def test_a_mixture_draws_each_source_by_its_weight(tmp_path, char_tokenizer):
    sources = [write(tmp_path, "a.jsonl", ["a"] * 6), write(tmp_path, "b.jsonl", ["bb"] * 18)]
    found = read_examples(data(*sources), char_tokenizer(), None)[1]
    shape = {"batch_size": 4, "max_length": 8, "packing": False, "shuffle": True, "seed": 0, "mixture": (3.0, 1.0)}
    loader = TrainLoader(found, **shape)
    drawn = [int(row[0]) for _ in range(12) for row in next(loader).examples]  # two epochs of 24 examples
    assert sum(index < 6 for index in drawn) == 36
    assert sorted(index for index in drawn if index < 6) == sorted([*range(6)] * 6)  # in turn, none left out
    assert len({index for index in drawn if index >= 6}) == 12
    lengths = epoch_lengths(found, (3.0, 1.0))
    assert np.unique(lengths, return_counts=True)[1].tolist() == [18, 6]
    state = loader.get_state()
    expected = next(loader).examples
    resumed = TrainLoader(found, **shape)
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed).examples, expected)
    train, held_out = split(found, 20)
    assert (train.sources, len(held_out.examples)) == ((4, 0), 20)


def test_held_out_examples_that_are_trained_are_counted(tmp_path, char_tokenizer):
    def read(name, texts):
        return read_examples(data(write(tmp_path, name, texts)), char_tokenizer(), None)[1]

    assert count_contained(read("b.jsonl", ["ab", "xy", "b"]), read("a.jsonl", ["ab", "b", "a"])) == 2


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_a_list_of_json_is_read_in_pieces(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", chunk)
    rows = [{"text": 'a "] [,'}, 12, [[], {}], "é\u2028", {"a": {"b": [1.5e3, None]}}]
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), f"\n\n [{json.dumps(rows[0])}]\n"):
        (tmp_path / "a.json").write_text(text)
        found = list(files.read_rows(tmp_path / "a.json"))
        assert [row.fields for row in found] == json.loads(text)
        assert [row.where for row in found] == [f"item {i}" for i in range(1, len(found) + 1)]
    for text, message in (
        ('[{"a": 1},\n {"a" 2}]', r"item 2: Expecting ':' delimiter: line 2"),
        ('[{"a": 1}\n {"a": 2}]', r"item 2: Expecting ',' delimiter: line 2"),
        ("[1, 2]\n[3]", "something follows the list"),
        ("[1, 2,]", "item 3: Expecting value: line 1"),
        ("[\n1,\n2", r"item 3: Expecting ',' delimiter: line 3"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=message):
            list(files.read_rows(tmp_path / "a.json"))
