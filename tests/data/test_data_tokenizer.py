"""Token ids: equal to other people's, and never BOS or EOS by accident."""

import json
import shutil

import pytest
import sentencepiece
import tokenizers

from lowrank.data.tokenizer import check_vocab, load_tokenizer
from lowrank.errors import UserError


def test_llama2_ids_equal_the_reference_cases(shared_data):
    folder = shared_data / "tokenizers" / "llama2"
    texts = (folder / "cases.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / "cases.out").read_text().split("\n")
    expected = [[int(i) for i in line.split()] for line in lines[: len(texts)]]
    assert len(texts) == 47
    assert load_tokenizer(folder).encode_batch(texts) == expected


def test_llama2_describes_itself(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "llama2")
    assert (tokenizer.vocab, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == ("<s>", "</s>", None)


def test_a_continuation_gets_no_space_before_it(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "llama2")
    assert tokenizer.encode("Hello world") == [15043, 3186]  # "▁Hello", "▁world"
    assert tokenizer.encode("Hello world", continues=True) == [10994, 3186]  # "Hello", "▁world"
    assert tokenizer.decode([3186]) == "world"
    assert tokenizer.decode([3186], continues=True) == " world"


def test_many_texts_are_encoded_by_words_with_the_same_ids(demo_base, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(demo_base)
    texts = [
        "",
        " ",
        "a",
        "  two  spaces ",
        "\n\n x\t y ",
        "é ﬁ \u3000 𒀀 e\u0301",
        "</s> <s>",
        "The words are fox, hen, goat.",
    ]
    expected = [[tokenizer.encode(text, continues) for text in texts * 2] for continues in (False, True)]
    monkeypatch.setattr("lowrank.data.tokenizer.MANY", 1)
    assert tokenizer.has_words
    assert [tokenizer.encode_batch(texts * 2, continues) for continues in (False, True)] == expected
    # A model with pieces of several words is left to itself.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["new york is new york"] * 50), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40,
        model_type="bpe", split_by_whitespace=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    assert not load_tokenizer(tmp_path).has_words


def test_markers_typed_by_a_user_are_only_text(demo_base, char_tokenizer):
    llama = load_tokenizer(demo_base)
    assert not {1, 2} & set(llama.encode("</s> <s>") + llama.encode("</s> <s>", continues=True))
    tokenizer = char_tokenizer()
    assert tokenizer.encode("a</s>") == [97, *map(ord, "</s>")]
    assert tokenizer.encode("<s>", continues=True) == list(map(ord, "<s>"))


def test_markers_written_by_a_template_are_tokens_with_their_offsets(shared_data, char_tokenizer):
    llama = load_tokenizer(shared_data / "tokenizers" / "llama2")
    assert llama.encode_markup(["<s>Hi é</s>"]) == [([1, 6324, 904, 2], [(0, 3), (3, 5), (5, 7), (7, 11)])]
    ids, offsets = char_tokenizer().encode_markup(["<s>a</s>"])[0]
    assert (ids, offsets) == ([1, 97, 2], [(0, 3), (3, 4), (4, 8)])


def test_decode_leaves_markers_and_unknown_ids_out(shared_data, char_tokenizer):
    llama = load_tokenizer(shared_data / "tokenizers" / "llama2")
    assert llama.decode([1, 15043, 3186, 2, 32001]) == "Hello world"  # 32001: a padded embedding has such rows
    assert char_tokenizer().decode([1, 104, 105, 2, 127]) == "hi"


def test_tokens_added_beside_a_sentencepiece_model(demo_base, tmp_path):
    shutil.copy(demo_base / "tokenizer.model", tmp_path)
    config = {"eos_token": {"content": "<|im_end|>"}, "added_tokens_decoder": {"1024": {"content": "<|im_end|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert (tokenizer.vocab, tokenizer.bos_id, tokenizer.eos_id) == (1025, 1, 1024)
    assert tokenizer.encode_markup(["Hi<|im_end|>"])[0][0] == [*load_tokenizer(demo_base).encode("Hi"), 1024]


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (tokenizers.normalizers.Prepend("▁"), None),  # as Llama 2's tokenizer.json
        (None, tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),  # as transformers 5 writes it
    ],
)
def test_a_json_tokenizer_continues_without_a_space_too(tmp_path, normalizer, pre_tokenizer):
    model = tokenizers.models.BPE(vocab={"▁": 0, "a": 1, "b": 2, "▁a": 3, "</s>": 4}, merges=[("▁", "a")])
    tokenizer = tokenizers.Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = tokenizers.normalizers.Sequence([normalizer])
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("ab") == [3, 2]
    assert loaded.encode("ab", continues=True) == [1, 2]
    assert loaded.decode([3, 2]) == "ab"
    assert loaded.decode([3, 2], continues=True) == " ab"


def test_settings_saved_by_a_training_run_neither_cut_nor_pad(char_tokenizer, tmp_path):
    char_tokenizer()
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("abcd") == [97, 98, 99, 100]


def test_bos_and_eos_come_from_the_settings_then_the_models_config(char_tokenizer, tmp_path):
    assert char_tokenizer(eos_token={"content": "<|im_end|>"}).eos_id == 4
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [4, 2]}))
    assert char_tokenizer().eos_id == 2
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_token) == (1, 4, "<|im_end|>")


@pytest.mark.parametrize("config", [{"bos_token": None}, {"writes_bos": False}])
def test_a_model_that_never_saw_bos_gets_none(char_tokenizer, config):
    assert char_tokenizer(**config).bos_id is None


def test_markers_that_only_the_settings_declare_are_markers(char_tokenizer, tmp_path):
    char_tokenizer()
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"] = []  # their texts are in the vocabulary still
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    declared = {"3": {"content": "<|im_start|>", "special": True}, "4": {"content": "<|im_end|>", "special": True}}
    settings = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": declared}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.markers == {"<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4}
    assert tokenizer.encode_markup(["<|im_start|>a<|im_end|>"])[0][0] == [3, 97, 4]
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("<|im_start|>a<|im_end|></s>", add_special_tokens=False).input_ids == [3, 97, 4, 2]


def test_the_template_file_goes_before_the_settings(char_tokenizer, tmp_path):
    assert char_tokenizer(chat_template="old").chat_template == "old"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert char_tokenizer(chat_template=named).chat_template == "plain"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert char_tokenizer(chat_template="old").chat_template == "new"


def test_a_tokenizer_larger_than_the_model_is_refused(char_tokenizer):
    tokenizer = char_tokenizer()
    check_vocab(tokenizer, 127, "base")
    with pytest.raises(UserError, match="of base has 127 tokens but the model's vocabulary has 126"):
        check_vocab(tokenizer, 126, "base")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.txt", b"", "has neither tokenizer.json nor tokenizer.model"),
        ("tokenizer.model", b"", "is not a SentencePiece model"),
        ("tokenizer.model", b"junk" * 9, "is not a SentencePiece model"),
        ("tokenizer.json", b"{", "is not valid JSON"),
        ("tokenizer.json", b"{}", "is not a tokenizer"),
    ],
)
def test_what_is_not_a_tokenizer_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_in_the_folder_above_is_pointed_at(tmp_path):
    (tmp_path / "7B").mkdir()
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path / "7B")
    assert str(error.value) == (
        f"{tmp_path}/7B has neither tokenizer.json nor tokenizer.model: "
        f"add --config.tokenizer={tmp_path}/tokenizer.model"
    )


def test_a_missing_path_and_an_unknown_eos_are_named(char_tokenizer, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="names eos_token '<end>', which the tokenizer does not have"):
        char_tokenizer(eos_token="<end>")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b'{"added_tokens_decoder": null}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", b'{"bos_token": {}}'),
        ("tokenizer_config.json", b'{"bos_token": ["a"]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"a": 1}]}'),
        ("tokenizer_config.json", b"[" * 100_000),
        ("added_tokens.json", b'{"a": "5"}'),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_a_slip_in_a_file_beside_a_tokenizer_is_one_line(demo_base, tmp_path, name, content):
    shutil.copyfile(demo_base / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
