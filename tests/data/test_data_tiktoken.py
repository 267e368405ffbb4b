"""Meta's Llama 3 vocabulary: tiktoken's ids, Meta's special tokens and chats, and damage named in one line."""

import base64
import itertools
import random
import re

import pytest

from lowrank.data import tiktoken
from lowrank.data.chat import chat_segments, format_chat
from lowrank.data.tokenizer import check_vocab, load_tokenizer
from lowrank.errors import UserError


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "tokenizers" / "llama3"


@pytest.fixture(scope="module")
def ranks(folder):
    lines = (folder / "tokenizer.model").read_text().split("\n")
    pairs = [line.split() for line in lines if line]
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def reference(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm as its authors describe it: join the neighbours of the lowest rank until none is left."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        joined = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not joined:
            return [ranks[part] for part in parts]
        _, i = min(joined)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_llama3_ids_equal_the_reference_cases(folder, llama3):
    texts = (folder / "cases.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / "cases.out").read_text().split("\n")
    expected = [[int(i) for i in line.split()] for line in lines[: len(texts)]]
    assert len(texts) == 47
    assert llama3.encode_batch(texts) == expected
    assert llama3.encode_batch(texts, continues=True) == expected  # Llama 3 puts no space before a text


def test_words_are_merged_as_tiktoken_merges_them(llama3, ranks):
    # The letters of one kind are one word to Llama 3, so any string of them can be compared without its splitting.
    draw = random.Random(0)
    alphabets = [
        "ab",
        "aeht",
        "abcdefghijklmnopqrstuvwxyz",
        "éàüßøł",
        "абвгдежзий",
        "ภาษาไทย"[:3],
        "日本語中文字",
        "𝒜𝒷𝒸",
    ]
    words = ["".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 40))) for _ in range(3000)]
    assert all(word.isalpha() for word in words)
    assert llama3.encode_batch(words) == [reference(word.encode(), ranks) for word in words]


def test_a_real_text_is_merged_as_tiktoken_merges_it(llama3, ranks, shared_data):
    text = (shared_data / "corpora" / "tinyshakespeare.txt").read_text()[:200_000]
    # WORD for English without digits or accents, in the standard library's notation.
    assert text.isascii()
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{1,3}| ?[^\sa-zA-Z0-9]+[\r\n]*"
    words = re.findall(pattern + r"|\s*[\r\n]+|\s+(?!\S)|\s+", text)
    assert "".join(words) == text
    assert llama3.encode(text) == [i for word in words for i in reference(word.encode(), ranks)]


def test_every_token_decodes_to_its_own_text(llama3, ranks):
    whole = {}
    for token, rank in ranks.items():
        try:
            whole[token.decode()] = rank
        except UnicodeDecodeError:  # a part of a character
            continue
    assert len(whole) > 120_000
    assert [llama3.decode([rank]) for rank in whole.values()] == list(whole)


def test_llama3_describes_itself(llama3):
    assert (llama3.vocab, llama3.bos_id, llama3.eos_id) == (128256, 128000, 128001)
    assert (llama3.bos_token, llama3.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert len(llama3.markers) == 256
    names = {
        "<|reserved_special_token_0|>": 128002,
        "<|finetune_right_pad_id|>": 128004,
        "<|reserved_special_token_2|>": 128005,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|reserved_special_token_3|>": 128011,
        "<|reserved_special_token_247|>": 128255,
    }
    assert {name: llama3.markers[name] for name in names} == names
    check_vocab(llama3, 128256, "base")


def test_llama3_markers_are_tokens_only_in_markup(llama3):
    assert 128009 not in llama3.encode("<|eot_id|>")
    assert llama3.encode_markup(["é<|eot_id|> Hi"]) == [([978, 128009, 21694], [(0, 1), (1, 11), (11, 14)])]
    assert llama3.decode([128000, 9906, 1917, 128009]) == "Hello world"


def test_a_chat_is_written_as_meta_writes_it(llama3):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "Hello! "},
        {"role": "user", "content": "Bye"},
    ]
    assert format_chat(messages, llama3) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert [part.text for part in chat_segments(messages[:3], llama3)[0] if part.trained] == ["Hello!<|eot_id|>"]


def test_settings_beside_a_tiktoken_file_go_first(made_up, tmp_path):
    (tmp_path / "tokenizer.model").symlink_to(made_up / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>", "chat_template": "own"}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (128000, 128009, "own")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:6], b"I*== 6", *lines[7:]], "line 7 is not a base64 text and a rank"),
        (lambda lines: [*lines[:6], b"Jw==", *lines[7:]], "line 7 is not a base64 text and a rank"),
        (lambda lines: [*lines[:6], lines[2], *lines[7:]], "line 7 repeats the token of rank 2"),
        (lambda lines: lines[:-1], "it ends after 127999 of Llama 3's 128000 ranks"),
        (lambda lines: [*lines[:-1], b"fn5+fn5+fn5+ 128000"], "rank 127999 is missing or there twice"),
        (lambda lines: [*lines[:-1], b"fn5+fn5+fn5+ 5"], "rank 6 is missing or there twice"),
        (lambda lines: [b"fn5+fn5+fn5+ 0", *lines[1:]], "it has no token for the bytes 0x21"),
        (lambda lines: [*lines, b"fn5+fn5+fn5+ 128000"], "has 128001 ranks and Llama 3's vocabulary 128000"),
    ],
)
def test_a_damaged_vocabulary_is_named_in_one_line(made_up, tmp_path, change, message):
    lines = (made_up / "tokenizer.model").read_bytes().splitlines()
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(change(lines)) + b"\n")
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(error.value)
    assert "\n" not in str(error.value)


def test_blank_lines_and_windows_line_breaks_are_no_damage(made_up, tmp_path):
    lines = (made_up / "tokenizer.model").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "tokenizer.model").write_bytes(lines + b"\r\n")
    assert tiktoken.is_tiktoken(tmp_path / "tokenizer.model")
    assert tiktoken.read_ranks(tmp_path / "tokenizer.model") == tiktoken.read_ranks(made_up / "tokenizer.model")
