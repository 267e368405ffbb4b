"""Meta's Llama 3 vocabulary: the ids of tiktoken, Meta's special tokens and prompt format, and a folder for transformers."""

import base64
import itertools
import random
import shutil

import pytest

from lowrank.data.examples import encode_examples
from lowrank.data.prompts import format_chat
from lowrank.data.records import Record
from lowrank.data.tokenizer import load_tokenizer, write_for_transformers
from lowrank.errors import UserError


@pytest.fixture(scope="module")
def file(shared_data):
    return shared_data / "tokenizers" / "llama3" / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(file):
    return load_tokenizer(file)


def test_ids_equal_the_reference_cases(tokenizer, file):
    texts = (file.parent / "cases.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (file.parent / "cases.out").read_text().split("\n")
    assert len(texts) == 47
    assert tokenizer.encode_batch(texts) == [[int(i) for i in line.split()] for line in lines[: len(texts)]]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


def test_ids_are_those_of_tiktoken_s_algorithm(tokenizer, file, shared_data):
    regex = pytest.importorskip("regex")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file.read_bytes().splitlines())}
    words = regex.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def encode(text):
        ids = []
        for word in words.findall(text):
            word = word.encode()
            parts = [word] if word in ranks else [bytes([byte]) for byte in word]
            while len(parts) > 1:
                joined = [ranks.get(a + b, 10**9) for a, b in itertools.pairwise(parts)]
                lowest = min(range(len(joined)), key=joined.__getitem__)
                if joined[lowest] == 10**9:
                    break
                parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
            ids += [ranks[part] for part in parts]
        return ids

    draw = random.Random(0)
    ranges = ((32, 126), (160, 591), (880, 1423), (0x4E00, 0x4FFF), (0x1F300, 0x1F64F), (9, 13), (97, 99))
    texts = ["".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(40)) for _ in range(300)]
    texts += ["a" * n for n in range(1, 40)] + ["=-" * n + " " * n for n in range(1, 40)]
    texts.append((shared_data / "corpora" / "tinyshakespeare.txt").read_text()[:20_000])
    assert tokenizer.encode_batch(texts) == [encode(text) for text in texts]


def test_special_tokens_are_meta_s(tokenizer):
    assert (tokenizer.vocab, tokenizer.bos_id, tokenizer.eos_id) == (128_256, 128_000, 128_001)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    for name, number in {
        "<|reserved_special_token_0|>": 128_002,
        "<|reserved_special_token_1|>": 128_003,
        "<|finetune_right_pad_id|>": 128_004,
        "<|reserved_special_token_2|>": 128_005,
        "<|start_header_id|>": 128_006,
        "<|end_header_id|>": 128_007,
        "<|eom_id|>": 128_008,
        "<|eot_id|>": 128_009,
        "<|python_tag|>": 128_010,
        "<|reserved_special_token_3|>": 128_011,
        "<|reserved_special_token_247|>": 128_255,
    }.items():
        assert tokenizer.markers[name] == number
    assert len(tokenizer.markers) == 256
    assert 128_009 not in tokenizer.encode("<|eot_id|>")  # typed by a user it is only text
    assert tokenizer.encode_markup(["a<|eot_id|>"])[0] == ([64, 128_009], [(0, 1), (1, 11)])
    assert tokenizer.decode([64, 128_009, 65]) == "ab"


def test_a_chat_is_in_meta_s_prompt_format_and_its_turns_and_their_ends_are_trained(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello!"},
    ]
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    asked = f"<|begin_of_text|>{head.format('system')}Be brief.<|eot_id|>{head.format('user')}Hi<|eot_id|>"
    assert format_chat(messages[:2], tokenizer) == asked + head.format("assistant")
    (example,) = encode_examples([Record({"messages": messages}, "line 1")], "chat", tokenizer, 200).examples
    assert example.ids[:2].tolist() == [128_000, 128_006]
    trained = example.ids[1:][example.loss_mask].tolist()
    assert tokenizer.decode(trained) == "Hello!" and trained[-1] == 128_009


def test_transformers_reads_what_is_written_for_it(tokenizer, file, tmp_path):
    transformers = pytest.importorskip("transformers")
    shutil.copyfile(file, tmp_path / "tokenizer.model")
    write_for_transformers(tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert ours.path.name == "tokenizer.json" and ours.markers == tokenizer.markers
    text = "Hello  world,\n\n3.14159 naïve 🦙 don't"
    assert theirs(text).input_ids == [128_000, *tokenizer.encode(text)]
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text) == tokenizer.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id) == (128_000, 128_001)
    messages = [{"role": "user", "content": "Hi"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == format_chat(messages, ours) == format_chat(messages, tokenizer)


def test_transformers_reads_a_sentencepiece_model_that_lies_alone(shared_data, tmp_path):
    transformers = pytest.importorskip("transformers")
    shutil.copyfile(shared_data / "stories260k" / "hf" / "tokenizer.model", tmp_path / "tokenizer.model")
    before = load_tokenizer(tmp_path)
    write_for_transformers(tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in ("Once upon a time", "a  b\nc é"):
        assert theirs(text).input_ids == [1, *before.encode(text)] == [1, *ours.encode(text)]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (before.bos_id, before.eos_id) == (ours.bos_id, ours.eos_id)


def test_files_that_say_more_are_left_alone(shared_data, tmp_path):
    shutil.copyfile(shared_data / "tokenizers" / "llama2" / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    write_for_transformers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}"


def lines_of(file) -> list[bytes]:
    return file.read_bytes().splitlines()[:1000]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda lines: [*lines[:500], b"!!!! 500", *lines[501:]], "line 501: not a token in base64 and its rank"),
        (lambda lines: [*lines[:500], b"IQ==", *lines[501:]], "line 501: not a token in base64 and its rank"),
        (lambda lines: [*lines[:500], lines[7].split()[0] + b" 500", *lines[501:]], "line 501: repeats a token"),
        (lambda lines: lines[:500] + lines[501:], "line 501: has rank 501, not 500"),
        (lambda lines: lines[:200], "lacks 56 of the 256 single bytes"),
        (lambda lines: [*lines[:999], lines[999][:-4]], "line 1000: "),
    ],
)
def test_a_vocabulary_that_is_not_whole_is_refused(file, tmp_path, spoil, said):
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(spoil(lines_of(file))))
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_in_the_folder_above_is_pointed_to(shared_data, tmp_path):
    shutil.copyfile(shared_data / "tokenizers" / "llama2" / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "7B").mkdir()
    with pytest.raises(
        UserError, match=r"has neither tokenizer\.json nor .*, or name .*tokenizer\.model, which is there"
    ):
        load_tokenizer(tmp_path / "7B")
