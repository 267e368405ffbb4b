"""`ModelConfig`: read from every spelling of config.json, refused by name, and the table of named sizes."""

import dataclasses
import json

import pytest

from lowrank.errors import UserError
from lowrank.model.architecture import (
    SIZES,
    ModelConfig,
    RopeScaling,
    hf_config,
    parameter_count,
    parse_config,
    read_config,
)

LLAMA_31 = {  # as meta-llama/Llama-3.1-8B-Instruct has it
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_1 = {  # as early conversions have it: no kv heads, no rope_theta, no biases
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "initializer_range": 0.02,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
SMOLLM2 = {  # as HuggingFaceTB/SmolLM2-135M has it
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}


def test_named_sizes_have_their_published_parameter_counts():
    counts = {name: parameter_count(config) for name, config in SIZES.items()}
    assert counts == {
        "llama-7b": 6_738_415_616,
        "llama-13b": 13_015_864_320,
        "llama2-7b": 6_738_415_616,
        "llama2-13b": 13_015_864_320,
        "llama2-70b": 68_976_648_192,
        "llama3-8b": 8_030_261_248,
        "llama3-70b": 70_553_706_496,
        "llama3.1-8b": 8_030_261_248,
        "llama3.1-70b": 70_553_706_496,
        "llama3.2-1b": 1_235_814_400,
        "llama3.2-3b": 3_212_749_824,
        "llama3.3-70b": 70_553_706_496,
        "tinyllama-1.1b": 1_100_048_384,
        "smollm2-135m": 134_515_008,
        "smollm2-360m": 361_821_120,
        "smollm2-1.7b": 1_711_376_384,
        "demo": 918_656,
    }


def test_published_configs_are_the_named_sizes():
    instruct = dataclasses.replace(SIZES["llama3.1-8b"], eos_ids=(128001, 128008, 128009))
    assert parse_config(LLAMA_31, "") == instruct
    assert parse_config(LLAMA_1, "") == SIZES["llama-7b"]
    assert parse_config(SMOLLM2, "") == SIZES["smollm2-135m"]


def test_transformers_5_spelling_reads_the_same():
    new = {k: v for k, v in LLAMA_31.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {
        "rope_parameters": LLAMA_31["rope_scaling"] | {"rope_theta": 500000.0},
        "dtype": "bfloat16",
        "head_dim": 128,
    }
    assert parse_config(new, "") == parse_config(LLAMA_31, "")
    plain = new | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    assert (parse_config(plain, "").rope_theta, parse_config(plain, "").rope_scaling) == (1e6, None)


def test_both_spellings_at_once_must_agree():
    both = LLAMA_31 | {"rope_parameters": LLAMA_31["rope_scaling"] | {"rope_theta": 500000.0}}
    assert parse_config(both, "") == parse_config(LLAMA_31, "")
    both["rope_parameters"] = both["rope_parameters"] | {"factor": 32.0, "rope_theta": 1e4}
    with pytest.raises(UserError) as error:
        parse_config(both, "config.json")
    assert "rope_theta is said twice and differs: 500000.0 and 10000.0" in str(error.value)
    assert "factor is said twice and differs: 8.0 and 32.0" in str(error.value)


def test_stories260k(shared_data):
    assert read_config(shared_data / "stories260k" / "hf") == ModelConfig(
        vocab=512, embed=64, mlp=172, layers=5, heads=8, kv_heads=4, head_dim=8, norm_eps=1e-5, rope_theta=10000.0,
        rope_scaling=None, tied_head=True, max_length=512, bos_id=1, eos_ids=(2,), stored_dtype="float32",
    )  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_what_is_written_reads_back(name):
    config = SIZES[name]
    assert parse_config(json.loads(json.dumps(hf_config(config))), "") == config
    odd = dataclasses.replace(config, bos_id=None, eos_ids=(), head_dim=48)
    assert parse_config(json.loads(json.dumps(hf_config(odd))), "") == odd


@pytest.mark.parametrize("name", ["llama2-70b", "llama3.2-1b", "llama3.3-70b", "smollm2-360m", "demo"])
def test_what_transformers_makes_of_it_reads_back(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(SIZES[name])))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again") == SIZES[name]


def test_every_offender_is_named_in_one_line():
    fields = LLAMA_31 | {
        "attention_bias": True,
        "hidden_act": "gelu",
        "sliding_window": 4096,
        "no_rope_layers": [1, 1, 1, 0],
        "quantization_config": {"quant_method": "bitsandbytes", "llm_int8_threshold": 6.0, "load_in_4bit": True},
        "vocab_size": -1,
        "num_hidden_layers": "32",
        "torch_dtype": "float8_e4m3fn",
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    del fields["rms_norm_eps"], fields["intermediate_size"]
    with pytest.raises(UserError) as error:
        parse_config(fields, "base/config.json")
    assert str(error.value) == (
        'base/config.json: rope_type "linear" is not supported (only default and llama3); '
        "vocab_size is -1, not a positive integer; intermediate_size is missing; "
        'num_hidden_layers is "32", not a positive integer; rms_norm_eps is missing; '
        "dtype float8_e4m3fn is not one of float32, float16, bfloat16; "
        'attention_bias = true is not supported (only false); hidden_act = "gelu" is not supported (only "silu"); '
        "sliding_window = 4096 is not supported; no_rope_layers = [1, 1, 1, 0] is not supported; "
        'quantization_config = {"quant_method": "bitsandbytes", "llm_int8_threshold": 6.... is not supported; '
        "mend config.json or give another base"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is no multiple of num_key_value_heads 5"),
        ({"hidden_size": 4097}, "hidden_size 4097 is no multiple of num_attention_heads 32"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"eos_token_id": ["</s>"]}, "bos_token_id and eos_token_id must be integers"),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes", not true or false'),
        ({"rope_scaling": [8.0]}, "rope_scaling and rope_parameters must be objects"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"rope_type": "default", "mscale": 2.0}}, "mscale = 2.0 is not supported"),
        ({"rms_norm_eps": True}, "rms_norm_eps is true, not a positive number"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "supported: llama with LlamaForCausalLM"),
        ({"model_type": "mistral"}, 'model_type "mistral" with architectures ["LlamaForCausalLM"] is not supported'),
        ({"model_type": "qwen2", "use_sliding_window": False}, "supported: llama with LlamaForCausalLM"),
    ],
)
def test_refused(change, said):
    with pytest.raises(UserError) as error:
        parse_config(LLAMA_31 | change, "config.json")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_null_means_unused():
    unused = {"quantization_config": None, "sliding_window": None, "pad_token_id": None, "num_key_value_heads": None}
    assert parse_config(LLAMA_1 | unused, "") == SIZES["llama-7b"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '"llama"', "\x00"])
def test_a_broken_file_is_one_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: (cannot be read as JSON|holds .*, not an object)"):
        read_config(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: not found"):
        read_config(tmp_path)


def test_llama3_scaling_is_read():
    assert parse_config(LLAMA_31, "").rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
