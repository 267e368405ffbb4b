"""Tokenizers: one whose ids can be read (every character's id is its code, four markers have the ids 1 to 4), and Llama 3's."""

import base64
import json

import pytest
import tokenizers

from lowrank.data.tokenizer import load_tokenizer

MARKERS = {"<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4}


@pytest.fixture
def char_tokenizer(tmp_path):
    """char_tokenizer(**tokenizer_config) -> a Tokenizer that puts BOS before a text (`writes_bos`); its folder is tmp_path."""

    def make(writes_bos=True, **config):
        codes = [10, *range(32, 127)]
        model = tokenizers.models.BPE(vocab={chr(i): i for i in codes} | MARKERS, merges=[])
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.decoder = tokenizers.decoders.Fuse()
        tokenizer.add_special_tokens(list(MARKERS))
        if writes_bos:
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "</s>"} | config
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(tmp_path)

    return make


@pytest.fixture(scope="session")
def made_up(tmp_path_factory):
    """A folder with a vocabulary of Llama 3's size: all bytes from 0x21 on, then tokens that mean nothing."""
    tokens = [bytes([i % 256]) for i in range(0x21, 0x121)] + [f"{i:06d}".encode() for i in range(256, 128_000)]
    folder = tmp_path_factory.mktemp("made_up")
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


@pytest.fixture(scope="session")
def llama3(shared_data):
    return load_tokenizer(shared_data / "tokenizers" / "llama3")
