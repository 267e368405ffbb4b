"""A tokenizer whose ids can be read: every character's id is its code, and four markers have the ids 1 to 4."""

import json

import pytest
import tokenizers

from lowrank.data.tokenizer import load_tokenizer

MARKERS = {"<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4}


@pytest.fixture
def char_tokenizer(tmp_path):
    """char_tokenizer(**tokenizer_config) -> a Tokenizer; its folder is tmp_path."""

    def make(**config):
        codes = [10, *range(32, 127)]
        model = tokenizers.models.BPE(vocab={chr(i): i for i in codes} | MARKERS, merges=[])
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.decoder = tokenizers.decoders.Fuse()
        tokenizer.add_special_tokens(list(MARKERS))
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "</s>"} | config
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(tmp_path)

    return make
