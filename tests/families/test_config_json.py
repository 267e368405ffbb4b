"""`ModelConfig`: read from every spelling of config.json, refused by name, and the table of named sizes."""

import dataclasses
import json
import math

import pytest

from lowrank.adapters.config import TARGETS
from lowrank.errors import UserError
from lowrank.families.config import ModelConfig, RopeScaling
from lowrank.families.config_json import FAMILIES, hf_config, parse_config, read_config
from lowrank.families.sizes import SIZES
from lowrank.families.tensor_names import hf_tensors

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
MISTRAL = {  # as mistralai/Mistral-7B-v0.1 has it
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN2 = {  # as Qwen/Qwen2.5-0.5B has it
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {  # as Qwen/Qwen3-0.6B has it
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_named_sizes_have_their_published_parameter_counts():
    def count(config):
        return sum(
            math.prod(shape) * (config.layers if "{}" in name else 1) for name, shape in hf_tensors(config).values()
        )

    counts = {name: count(config) for name, config in SIZES.items()}
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
        "llama3.1-405b": 405_853_388_800,
        "llama3.2-1b": 1_235_814_400,
        "llama3.2-3b": 3_212_749_824,
        "llama3.3-70b": 70_553_706_496,
        "tinyllama-1.1b": 1_100_048_384,
        "smollm-135m": 134_515_008,
        "smollm2-135m": 134_515_008,
        "smollm2-360m": 361_821_120,
        "smollm2-1.7b": 1_711_376_384,
        "mistral-7b": 7_248_023_552,
        "mistral-7b-v0.1": 7_241_732_096,
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-1.5b": 1_543_714_304,
        "qwen2.5-7b": 7_615_616_512,
        "qwen3-0.6b": 596_049_920,
        "qwen3-1.7b": 1_720_574_976,
        "qwen3-8b": 8_190_735_360,
        "demo": 918_656,
    }


def test_published_configs_are_the_named_sizes():
    instruct = dataclasses.replace(SIZES["llama3.1-8b"], eos_ids=(128001, 128008, 128009))
    assert parse_config(LLAMA_31, "") == instruct
    assert parse_config(LLAMA_1, "") == SIZES["llama-7b"]
    assert parse_config(SMOLLM2, "") == SIZES["smollm2-135m"]
    assert parse_config(MISTRAL, "") == SIZES["mistral-7b-v0.1"]
    newer = MISTRAL | {"sliding_window": None, "rope_theta": 1e6, "vocab_size": 32768}
    assert parse_config(newer, "") == SIZES["mistral-7b"]
    assert parse_config(QWEN2, "") == SIZES["qwen2.5-0.5b"]
    assert parse_config(QWEN3, "") == SIZES["qwen3-0.6b"]


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
    assert "rope_theta is given twice, with different values: 500000.0 and 10000.0" in str(error.value)
    assert "factor is given twice, with different values: 8.0 and 32.0" in str(error.value)


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


@pytest.mark.parametrize(
    "name",
    ["llama2-70b", "llama3.2-1b", "llama3.3-70b", "demo", "mistral-7b", "mistral-7b-v0.1", "qwen2.5-7b", "qwen3-0.6b"],
)
def test_what_transformers_makes_of_it_reads_back(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(SIZES[name])))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again") == SIZES[name]


def test_every_offender_is_named_in_one_line():
    fields = LLAMA_31 | {
        "partial_rotary_factor": 0.5,
        "hidden_act": "gelu",
        "sliding_window": 4096,
        "no_rope_layers": [1, 1, 1, 0],
        "quantization_config": {"quant_method": "bitnet"},  # quantises float weights as they are loaded
        "training_steps": 5,
        "vocab_size": -1,
        "num_hidden_layers": "32",
        "torch_dtype": "float8_e4m3fn",
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    fields["rms_norm_eps"] = True
    del fields["intermediate_size"]
    with pytest.raises(UserError) as error:
        parse_config(fields, "base/config.json")
    assert str(error.value) == (
        'base/config.json: num_hidden_layers is "32", not a positive integer; '
        'rope_type "linear" is not supported (only default and llama3); '
        "vocab_size is -1, not a positive integer; intermediate_size is missing; "
        "rms_norm_eps is true, not a positive number; "
        "dtype float8_e4m3fn is not one of float32, float16, bfloat16; "
        'hidden_act = "gelu" is not supported (only "silu"); partial_rotary_factor = 0.5 is not supported (only 1); '
        "sliding_window = 4096 is not supported; no_rope_layers = [1, 1, 1, 0] is not supported; "
        'quantization_config = {"quant_method": "bitnet"} is not supported: '
        "give the base's weights in 16 or 32 bits; training_steps = 5 is not supported; "
        "fix config.json or give another base"
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
        (
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
            "supported: llama with LlamaForCausalLM, mistral with MistralForCausalLM, qwen2 with Qwen2ForCausalLM, "
            "qwen3 with Qwen3ForCausalLM",
        ),
        ({"model_type": ["llama"]}, 'model_type ["llama"] with architectures'),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'rope_type "yarn" is not supported'),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 'rope_type "dynamic" is not supported'),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, 'rope_type "longrope" is not supported'),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, "num_local_experts = 8 is not supported"),
        ({"num_experts": 64}, "num_experts = 64 is not supported"),
        ({"attention_bias": "qkv"}, 'attention_bias is "qkv", not true or false'),
        ({"layer_types": ["full_attention"] * 32}, "layer_types = "),
        ({"use_rope": False}, "use_rope = false is not supported"),  # not every switch that is off changes nothing
        ({"isCausal": False}, "isCausal = false is not supported"),
        ({"position_embedding": "alibi"}, 'position_embedding = "alibi" is not supported'),
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map = "),
        ({"attention_dropout": ""}, 'attention_dropout = "" is not supported (only 0)'),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
    ],
)
def test_refused(change, said):
    with pytest.raises(UserError) as error:
        parse_config(LLAMA_31 | change, "config.json")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (MISTRAL | {"sliding_window": 0}, "sliding_window is 0, not a positive integer"),
        (MISTRAL | {"use_sliding_window": False}, "sliding_window is 4096, but use_sliding_window is false"),
        (MISTRAL | {"mlp_bias": True}, "mlp_bias = true is not supported (only false)"),
        (QWEN2 | {"use_mrope": True}, "use_mrope = true is not supported (only false)"),
        (QWEN2 | {"attention_bias": True}, "attention_bias = true is not supported (only false)"),
        (QWEN2 | {"max_window_layers": -1}, "max_window_layers is -1, not a number of layers"),
        (
            QWEN2 | {"layer_types": ["sliding_attention"] * 24},
            "layer_types has sliding_attention, but no sliding_window is on",
        ),
        (
            QWEN2 | {"layer_types": ["full_attention"] * 23},
            "one of full_attention and sliding_attention for each of 24",
        ),
        (QWEN3 | {"layer_types": ["linear_attention"] * 28}, 'layer_types is ["linear_attention",'),
        (QWEN3 | {"layer_types": "full_attention"}, 'layer_types is "full_attention"'),
        (QWEN3 | {"head_dim": 0}, "head_dim is 0, not a positive integer"),
        (QWEN3 | {"num_experts": 128, "moe_intermediate_size": 768}, "num_experts = 128 is not supported"),
        (QWEN3 | {"model_type": "qwen3_moe"}, 'model_type "qwen3_moe" with architectures'),
    ],
)
def test_refused_in_other_families(fields, said):
    with pytest.raises(UserError) as error:
        parse_config(fields, "config.json")
    assert said in str(error.value)


@pytest.mark.parametrize(
    "note",
    [
        {"internal_version": "7b-alpha-v2"},  # ALLaM
        {"sequence_parallel_enabled": False, "selective_checkpoint_enabled": False},
        {"_comment": "", "languages": ["en", "ar"], "model_name": "x", "trainer": {}, "zero3": False},
        {"quantization_config": {}},
        {"quantization_config": {"load_in_4bit": False, "load_in_8bit": False}},
        # Left over from a merge to 16 bits; weights that are quantised are refused by their dtype.
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"architectures": ["LLaMAForCausalLM"]},  # conversions of spring 2023
    ],
)
def test_notes_and_what_is_left_over_change_nothing(note):
    assert parse_config(LLAMA_31 | note, "config.json") == parse_config(LLAMA_31, "config.json")


def test_biases_of_llama_and_qwen3():
    both = parse_config(LLAMA_31 | {"attention_bias": True, "mlp_bias": True}, "").biased
    assert both == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert parse_config(QWEN3 | {"attention_bias": True}, "").biased == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert parse_config(QWEN2, "").biased == ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("family", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_which_layers_have_a_window(family):
    on = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    mixed = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]

    def windows(**change):
        return parse_config(family | on | change, "").windows

    assert windows() == (0, 0, 0, 8)
    assert windows(max_window_layers=0) == (8, 8, 8, 8)
    assert windows(max_window_layers=4) == ()
    assert windows(use_sliding_window=False) == ()
    assert windows(sliding_window=None) == ()
    assert windows(layer_types=mixed) == (8, 0, 0, 8)
    assert windows(layer_types=["full_attention"] * 4) == ()


def test_every_layer_of_mistral_has_its_window():
    assert parse_config(MISTRAL | {"num_hidden_layers": 2}, "").windows == (4096, 4096)
    absent = {name: value for name, value in MISTRAL.items() if name != "sliding_window"}
    assert parse_config(absent, "") == parse_config(MISTRAL, "")  # and null is none: the newer releases, above


# Every number differs from all defaults; 30 layers, so that the default of max_window_layers, 28, makes a difference.
FULL = ModelConfig(
    vocab=50, embed=192, mlp=20, layers=30, heads=32, kv_heads=4, head_dim=10, norm_eps=1e-3, rope_theta=7.0,
    tied_head=True, max_length=99, bos_id=5, eos_ids=(6,), stored_dtype="float16",
)  # fmt: skip
OWN = {
    "llama": {"biased": TARGETS},
    "mistral": {"windows": (3,) * 30},
    "qwen2": {"biased": TARGETS[:3], "windows": (0,) * 2 + (3,) * 28},
    "qwen3": {"biased": TARGETS[:4], "windows": (0,) * 2 + (3,) * 28, "qk_norm": True},
}
REQUIRED = """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    """.split()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_field_is_what_transformers_makes_of_it(family):
    transformers = pytest.importorskip("transformers")
    fields = hf_config(dataclasses.replace(FULL, family=family, **OWN[family]))
    fields.pop("layer_types", None)  # it says again what use_sliding_window and max_window_layers say
    full, changed = parse_config(fields, ""), set()
    for name in fields.keys() - set(REQUIRED):
        absent = {key: value for key, value in fields.items() if key != name}
        theirs = transformers.AutoConfig.for_model(**absent)
        found = parse_config(absent, "")
        assert found == parse_config(json.loads(theirs.to_json_string(use_diff=False)), ""), name
        changed |= {name} if found != full else set()
    assert changed == fields.keys() - {*REQUIRED, "architectures", "hidden_act", "rope_scaling"}


def test_what_a_family_cannot_say_is_not_written():
    with pytest.raises(ValueError, match="llama cannot say"):
        hf_config(dataclasses.replace(FULL, windows=(3,) * 30))
    with pytest.raises(ValueError, match="mistral cannot say"):
        hf_config(dataclasses.replace(FULL, family="mistral", biased=("q_proj",)))
    with pytest.raises(ValueError, match="qwen2 cannot say"):
        hf_config(dataclasses.replace(FULL, family="qwen2", biased=TARGETS[:3], windows=(3, 4) * 15))


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
