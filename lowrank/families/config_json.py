"""Read and write a `config.json` of Hugging Face: the four families, in old and new spelling.

Reading is strict: a field is understood, known not to affect what is computed, or refused by name, because a field that
is ignored silently is a model that computes something else. Left out: token ids that only generation needs.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any

from lowrank.errors import UserError
from lowrank.families.config import ATTENTION, MLP, ModelConfig, RopeScaling
from lowrank.files import paths

FAMILIES = {  # values of `model_type`, and of `architectures` beside them
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Transformers' defaults for absent fields. A null means "not used", not the default.
_IDS, _QWEN = {"bos_token_id": 1, "eos_token_id": 2}, {"num_key_value_heads": 32, "max_position_embeddings": 32768}
ABSENT = {
    "llama": _IDS | {"max_position_embeddings": 2048},
    "mistral": _IDS | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _QWEN | {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": _QWEN | {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}
DTYPES = ("float32", "float16", "bfloat16")
OLD_CLASSES = {"LLaMAForCausalLM": "LlamaForCausalLM"}  # conversions of spring 2023
LAYER_TYPES = ("full_attention", "sliding_attention")
REQUIRED = object()  # the default of a field that must not be absent

# Fields that affect what is computed and have one supported value, unless the family reads them; an absent field has it.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "rope_interleaved": False,  # SmolLM2 writes it
    "use_sliding_window": False,
    "use_mrope": False,  # Qwen2.5 writes it
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
}
# Fields that do not affect what is computed: bookkeeping, initialisation, defaults of generation, notes of other tools.
# `pretraining_tp` only splits the same matrix products, `is_llama_config` repeats `model_type`.
HARMLESS = frozenset(
    """
    model_type architectures transformers_version _name_or_path name_or_path torch_dtype dtype use_cache
    initializer_range pretraining_tp is_llama_config transformers.js_config max_sequence_length tokenizer_class
    pad_token_id sep_token_id decoder_start_token_id is_decoder use_bfloat16 tf_legacy_loss torchscript return_dict
    output_attentions output_hidden_states id2label label2id do_sample temperature top_k top_p num_beams max_length
    min_length repetition_penalty length_penalty no_repeat_ngram_size attn_implementation _attn_implementation
    diversity_penalty early_stopping encoder_no_repeat_ngram_size num_beam_groups num_return_sequences output_scores
    remove_invalid_values return_dict_in_generate typical_p
    _attn_implementation_autoset _flash_attn_2_enabled _commit_hash unsloth_fixed unsloth_version
    """.split()
)
# A field that nobody knows is a note (a text, or a switch that is off) unless its name has one of these words.
MATHEMATICS = frozenset(
    """
    act activation alibi alpha attention attn auto bias block cap causal conv cross dim embed embedding embeddings epsilon
    eps expert experts factor ffn func function gate group head heads hidden kind layer layers logit logits lora mask method
    mlp mode moe mtp multiplier norm normalization num pos position positional positions prune quant
    quantization quantized residual rms rope rotary router scale scaled scaling sequential shared skip sliding softcap
    softmax sparse sparsity ssm state tie tied theta type vocab window yarn
    """.split()
)
# Methods whose files hold no float weights. The settings are left over where a model was merged to 16 bits: where they are
# not, reading the weights refuses their dtype by name.
QUANTIZED = ("bitsandbytes", "gptq", "awq", "fp8")


def read_config(folder: paths.PathLike) -> ModelConfig:
    """The `ModelConfig` of `folder/config.json`, in the old spelling or that of transformers 5. UserError if unsupported."""
    path = paths.path(folder) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; give a folder with a config.json and its weights") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); fetch or write the file again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds {_brief(fields)}, not an object; fetch the file again")
    return parse_config(fields, where=str(path))


def parse_config(fields: dict[str, Any], where: str) -> ModelConfig:
    """As `read_config`, from the fields; `where` begins the one error, which lists every problem."""
    family, classes = fields.get("model_type"), fields.get("architectures")
    if isinstance(classes, list):
        classes = [OLD_CLASSES.get(name, name) if isinstance(name, str) else name for name in classes]
    if not isinstance(family, str) or family not in FAMILIES or (classes and classes != [FAMILIES[family]]):
        supported = ", ".join(f"{name} with {known}" for name, known in FAMILIES.items())
        said = f"model_type {json.dumps(family)} with architectures {json.dumps(classes)}"
        raise UserError(f"{where}: {said} is not supported; supported: {supported}; give a base of one of these")
    given = ABSENT[family] | fields
    take = _Fields(given)
    embed, heads = take.size("hidden_size"), take.size("num_attention_heads")
    kv_heads = take.size("num_key_value_heads", absent=heads)
    head_dim = take.size("head_dim", absent=embed // heads)
    layers = take.size("num_hidden_layers")
    theta, scaling = _rope(take)
    eos = take.rest.pop("eos_token_id", None)
    config = ModelConfig(
        vocab=take.size("vocab_size"),
        embed=embed,
        mlp=take.size("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=take.number("rms_norm_eps", absent=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_head=take.switch("tie_word_embeddings"),
        max_length=take.size("max_position_embeddings"),
        bos_id=take.rest.pop("bos_token_id", None),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        # transformers saved float32 by default, and then wrote no dtype
        stored_dtype=str(fields.get("dtype") or fields.get("torch_dtype") or "float32").removeprefix("torch."),
        family=family,
        biased=_biased(take, family),
        qk_norm=family == "qwen3",
        windows=_windows(take, family, layers),
    )
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    if not any(problem.startswith(names) for problem in take.problems):  # these fields are usable
        if given.get("head_dim") is None:
            take.require(embed % heads == 0, f"hidden_size {embed} is no multiple of num_attention_heads {heads}")
        take.require(heads % kv_heads == 0, f"num_attention_heads {heads} is no multiple of {names[2]} {kv_heads}")
        take.require(head_dim % 2 == 0, f"head_dim {head_dim} is odd, rotary positions need pairs")
    take.require(config.stored_dtype in DTYPES, f"dtype {config.stored_dtype} is not one of {', '.join(DTYPES)}")
    ids = [config.bos_id or 0, *config.eos_ids]
    take.require(all(_is_int(i) for i in ids), "bos_token_id and eos_token_id must be integers")
    if problems := take.problems + take.leftovers():
        raise UserError(f"{where}: {'; '.join(problems)}; fix config.json or give another base")
    return config


def _biased(take: "_Fields", family: str) -> tuple[str, ...]:
    """The projections with a bias; Qwen 2 has no field for it."""
    if family == "qwen2":
        return ATTENTION[:3]
    attention = family in ("llama", "qwen3") and take.switch("attention_bias")
    mlp = family == "llama" and take.switch("mlp_bias")
    return (ATTENTION if attention else ()) + (MLP if mlp else ())


def _windows(take: "_Fields", family: str, layers: int) -> tuple[int, ...]:
    """Each layer's window, () if no layer has one. Each family has its own fields for it."""
    if family == "llama":
        return ()
    window = take.size("sliding_window", absent=0)
    if family == "mistral":
        contradiction = window > 0 and take.rest.get("use_sliding_window") is False
        take.require(not contradiction, f"sliding_window is {window}, but use_sliding_window is false")
        return (window,) * layers if window else ()
    window = window if take.switch("use_sliding_window") else 0
    first = take.take("max_window_layers", lambda v: _is_int(v) and v >= 0, "a number of layers", absent=layers)
    kinds = take.take(
        "layer_types",
        lambda v: isinstance(v, list) and len(v) == layers and all(kind in LAYER_TYPES for kind in v),
        f"one of {' and '.join(LAYER_TYPES)} for each of {layers} layers",
        absent=[LAYER_TYPES[window > 0 and layer >= first] for layer in range(layers)],
    )
    sliding = [kind == "sliding_attention" for kind in kinds] if isinstance(kinds, list) else []
    take.require(window > 0 or not any(sliding), "layer_types has sliding_attention, but no sliding_window is on")
    return tuple(window if on else 0 for on in sliding) if any(sliding) else ()


def _rope(take: "_Fields") -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling: `rope_theta` and `rope_scaling`, or both in transformers 5's `rope_parameters`."""
    old, new = (take.rest.pop(name, None) or {} for name in ("rope_scaling", "rope_parameters"))
    theta = take.number("rope_theta", absent=None)
    if not (isinstance(old, dict) and isinstance(new, dict)):
        take.problems.append("rope_scaling and rope_parameters must be objects")
        return 1.0, None
    sources = [{} if theta is None else {"rope_theta": theta}, old, new]
    rope = _Fields({name: value for source in sources for name, value in source.items()})
    for name, value in rope.rest.items():
        values = [source[name] for source in sources if name in source]
        text = " and ".join(json.dumps(each) for each in values)
        take.require(all(each == value for each in values), f"{name} is given twice, with different values: {text}")
    theta, scaling = rope.number("rope_theta", absent=10_000.0), None
    kind = rope.rest.pop("rope_type", rope.rest.get("type", "default"))
    rope.rest.pop("type", None)
    if kind == "llama3":
        scaling = RopeScaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_length=rope.size("original_max_position_embeddings"),
        )
    elif kind != "default":
        rope.rest.clear()
        rope.problems.append(f"rope_type {json.dumps(kind)} is not supported (only default and llama3)")
    take.problems += rope.problems + rope.leftovers()
    return theta, scaling


class _Fields:
    """Takes fields out one by one and collects their problems, so that one error lists all."""

    def __init__(self, fields: dict[str, Any]):
        self.rest = dict(fields)
        self.problems: list[str] = []

    def require(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    def take(self, name: str, valid: Callable[[Any], bool], wanted: str, absent: Any) -> Any:
        value = self.rest.pop(name, None)
        if value is None and absent is not REQUIRED:
            return absent
        if value is not None and valid(value):
            return value
        self.problems.append(f"{name} is missing" if value is None else f"{name} is {_brief(value)}, not {wanted}")
        return 1  # a placeholder until the problems are raised

    def size(self, name: str, absent: Any = REQUIRED) -> Any:
        return self.take(name, lambda v: _is_int(v) and v > 0, "a positive integer", absent)

    def number(self, name: str, absent: Any = REQUIRED) -> Any:
        valid = lambda v: type(v) in (int, float) and 0 < v < math.inf  # noqa: E731
        value = self.take(name, valid, "a positive number", absent)
        return value if value is None else float(value)

    def switch(self, name: str) -> bool:
        return self.take(name, lambda v: isinstance(v, bool), "true or false", absent=False)

    def leftovers(self) -> list[str]:
        problems = []
        for name, value in self.rest.items():
            if name in HARMLESS or value is None or _is_note(name, value):  # null is transformers' word for "not used"
                continue
            if name == "quantization_config" and _is_left_over(value):
                continue
            if name in ("quantization", "quantization_config"):
                problems.append(f"{name} = {_brief(value)} is not supported: give the base's weights in 16 or 32 bits")
            elif name not in FIXED:
                problems.append(f"{name} = {_brief(value)} is not supported")
            elif value != FIXED[name]:
                problems.append(f"{name} = {_brief(value)} is not supported (only {json.dumps(FIXED[name])})")
        return problems


def _is_note(name: str, value: Any) -> bool:
    """Whether a field that nobody knows can be no more than a maker's note, or a training's switch that is off."""
    words = re.findall("[a-z]+", re.sub("([A-Z])", r"_\1", name).lower())
    text = isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))
    return name not in FIXED and (text or value is False or value == {}) and not MATHEMATICS.intersection(words)


def _is_left_over(value: Any) -> bool:
    """Whether settings of a quantisation say nothing, or nothing that float weights would not contradict."""
    if not isinstance(value, dict):
        return False
    return value.get("quant_method") in QUANTIZED or not any(value.values())


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of a `config.json`, in the spelling that every transformers release reads.

    ValueError for a config that its family cannot express, such as a Llama with windows.
    """
    c, scaling = config, config.rope_scaling
    fields = {
        "architectures": [FAMILIES[c.family]],
        "model_type": c.family,
        "vocab_size": c.vocab,
        "hidden_size": c.embed,
        "intermediate_size": c.mlp,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        },
        "tie_word_embeddings": c.tied_head,
        "max_position_embeddings": c.max_length,
        "bos_token_id": c.bos_id,
        "eos_token_id": c.eos_ids[0] if len(c.eos_ids) == 1 else list(c.eos_ids) or None,
        "torch_dtype": c.stored_dtype,
    }
    window = max(c.windows, default=0)
    if c.family in ("llama", "qwen3"):
        fields["attention_bias"] = "q_proj" in c.biased
    if c.family == "llama":
        fields["mlp_bias"] = "gate_proj" in c.biased
    if c.family == "mistral":
        fields["sliding_window"] = window or None
    if c.family in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = window > 0
        fields["sliding_window"] = window or None
        # Releases before layer_types read max_window_layers: all layers from there on have the window.
        fields["max_window_layers"] = c.windows.index(window) if window else c.layers
        fields["layer_types"] = [LAYER_TYPES[layer > 0] for layer in c.windows or (0,) * c.layers]
    if parse_config(fields, "hf_config") != c:
        raise ValueError(f"a config.json of model_type {c.family} cannot say {c}")
    return fields
