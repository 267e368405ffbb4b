"""What a LLaMA-style decoder is made of: `ModelConfig`, read from a `config.json`, and a table of named sizes.

One decoder serves every family: a family is a set of values of these fields, never a class of its own. Reading is
strict: each field of a `config.json` is understood, known to leave the mathematics alone, or refused by name, because a
field passed over in silence is a model that computes something else. Left out: token ids that only generation needs.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

from lowrank.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape and the constants of a decoder. Sizes in elements, token ids as in the tokenizer."""

    vocab: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied_head: bool = False
    max_length: int = 2048
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)
    stored_dtype: str = "bfloat16"  # what the checkpoint's tensors are held in, as its config says
    family: str = "llama"  # whose config.json it is: a name for files, which no computation looks at
    biased: tuple[str, ...] = ()  # the projections with a bias
    qk_norm: bool = False  # RMSNorm over each head of q and k, before they are rotated
    windows: tuple[int, ...] = ()  # of each layer: how many tokens back a query sees, itself included; 0 is all


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters of the base; a tied head counts once."""
    c = config
    attention = 2 * c.embed * (c.heads + c.kv_heads) * c.head_dim  # q and o, k and v
    layer = attention + 3 * c.embed * c.mlp + 2 * c.embed
    return c.layers * layer + c.embed + c.vocab * c.embed * (1 if c.tied_head else 2)


# ---------------------------------------------------------------------------------------------- config.json -> config

FAMILIES = ("llama",)  # values of `model_type`
ARCHITECTURES = ("LlamaForCausalLM",)
DTYPES = ("float32", "float16", "bfloat16")
REQUIRED = object()  # in place of the value of an absent field

# Fields that change what is computed and have one supported value; a field that is absent has that value.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "rope_interleaved": False,  # SmolLM2 writes it
    "use_sliding_window": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
}
# Fields that leave the mathematics alone: bookkeeping, initialisation, defaults of generation, notes of other tools.
# `pretraining_tp` only splits the same matrix products, `is_llama_config` says what `model_type` says.
HARMLESS = frozenset(
    """
    model_type architectures transformers_version _name_or_path name_or_path torch_dtype dtype use_cache
    initializer_range pretraining_tp is_llama_config transformers.js_config max_sequence_length tokenizer_class
    pad_token_id sep_token_id decoder_start_token_id is_decoder use_bfloat16 tf_legacy_loss torchscript return_dict
    output_attentions output_hidden_states id2label label2id do_sample temperature top_k top_p num_beams max_length
    min_length repetition_penalty length_penalty no_repeat_ngram_size attn_implementation _attn_implementation
    _attn_implementation_autoset _flash_attn_2_enabled unsloth_fixed unsloth_version
    """.split()
)


def read_config(folder: str | os.PathLike) -> ModelConfig:
    """The `ModelConfig` of `folder/config.json`, in the old spelling or that of transformers 5."""
    path = pathlib.Path(folder) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; give a folder with a config.json and its weights") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); fetch or write the file again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds {_brief(fields)}, not an object; fetch the file again")
    return parse_config(fields, where=str(path))


def parse_config(fields: dict[str, Any], where: str) -> ModelConfig:
    """As `read_config`, from the fields themselves; `where` begins the one error that lists every offender."""
    family, classes = fields.get("model_type"), fields.get("architectures") or list(ARCHITECTURES)
    if family not in FAMILIES or classes != list(ARCHITECTURES):
        raise UserError(
            f"{where}: model_type {json.dumps(family)} with architectures {json.dumps(classes)} is not supported; "
            f"supported: {', '.join(FAMILIES)} with {', '.join(ARCHITECTURES)}"
        )
    take = _Fields(fields)
    embed, heads = take.size("hidden_size"), take.size("num_attention_heads")
    kv_heads = take.size("num_key_value_heads", absent=heads)
    head_dim = take.size("head_dim", absent=embed // heads)
    theta, scaling = _rope(take)
    eos = take.rest.pop("eos_token_id", 2)
    config = ModelConfig(
        vocab=take.size("vocab_size"),
        embed=embed,
        mlp=take.size("intermediate_size"),
        layers=take.size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=take.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_head=take.switch("tie_word_embeddings"),
        max_length=take.size("max_position_embeddings", absent=fields.get("max_sequence_length") or 2048),
        bos_id=take.rest.pop("bos_token_id", 1),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        # torch held weights in float32 unless told, so a config that says nothing means float32
        stored_dtype=str(fields.get("dtype") or fields.get("torch_dtype") or "float32").removeprefix("torch."),
    )
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    if not any(problem.startswith(names) for problem in take.problems):  # else these would be false alarms
        if fields.get("head_dim") is None:
            take.require(embed % heads == 0, f"hidden_size {embed} is no multiple of num_attention_heads {heads}")
        take.require(heads % kv_heads == 0, f"num_attention_heads {heads} is no multiple of {names[2]} {kv_heads}")
        take.require(head_dim % 2 == 0, f"head_dim {head_dim} is odd, rotary positions turn pairs")
    take.require(config.stored_dtype in DTYPES, f"dtype {config.stored_dtype} is not one of {', '.join(DTYPES)}")
    ids = [config.bos_id or 0, *config.eos_ids]
    take.require(all(_is_int(i) for i in ids), "bos_token_id and eos_token_id must be integers")
    take.finish(where)
    return config


def _rope(take: "_Fields") -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling: `rope_theta` and `rope_scaling`, or both in transformers 5's `rope_parameters`."""
    old, new = (take.rest.pop(name, None) or {} for name in ("rope_scaling", "rope_parameters"))
    theta = take.number("rope_theta", absent=None)
    if not (isinstance(old, dict) and isinstance(new, dict)):
        take.problems.append("rope_scaling and rope_parameters must be objects")
        return 1.0, None
    said = [{} if theta is None else {"rope_theta": theta}, old, new]
    rope = _Fields({name: value for place in said for name, value in place.items()})
    for name in rope.rest:
        values = [json.dumps(place[name]) for place in said if name in place]
        equal = all(place[name] == rope.rest[name] for place in said if name in place)
        take.require(equal, f"{name} is said twice and differs: {' and '.join(values)}")
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
    """Takes fields out one by one and notes what is wrong with them, so that everything is said in one error."""

    def __init__(self, fields: dict[str, Any]):
        self.rest, self.problems = dict(fields), []

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
        return 1  # stands in until `finish` raises

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
            if name in HARMLESS or value is None:  # null is transformers' word for "not used"
                continue
            if name not in FIXED:
                problems.append(f"{name} = {_brief(value)} is not supported")
            elif value != FIXED[name]:
                problems.append(f"{name} = {_brief(value)} is not supported (only {json.dumps(FIXED[name])})")
        return problems

    def finish(self, where: str) -> None:
        problems = self.problems + self.leftovers()
        if problems:
            raise UserError(f"{where}: {'; '.join(problems)}; mend config.json or give another base")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------------------------------- config -> config.json


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of a `config.json`, in the spelling that every transformers release reads."""
    scaling = config.rope_scaling
    return {
        "architectures": list(ARCHITECTURES),
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.embed,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        },
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.max_length,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "torch_dtype": config.stored_dtype,
    }


# --------------------------------------------------------------------------------------------------------- named sizes

_LLAMA_1 = ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, norm_eps=1e-6, stored_dtype="float16")
_LLAMA_2 = dataclasses.replace(_LLAMA_1, norm_eps=1e-5, max_length=4096)
_LLAMA_3 = ModelConfig(
    128256, 4096, 14336, 32, 32, 8, 128, rope_theta=500_000.0, max_length=8192, bos_id=128000, eos_ids=(128001,)
)
_LLAMA_31 = dataclasses.replace(_LLAMA_3, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), max_length=131072)
_LLAMA_32 = dataclasses.replace(_LLAMA_31, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), tied_head=True)
_SMOLLM2 = ModelConfig(
    49152, 576, 1536, 30, 9, 3, 64, rope_theta=100_000.0, tied_head=True, max_length=8192, bos_id=0, eos_ids=(0,)
)
_13B = {"embed": 5120, "mlp": 13824, "layers": 40, "heads": 40, "kv_heads": 40}
_70B = {"embed": 8192, "mlp": 28672, "layers": 80, "heads": 64, "kv_heads": 8}

SIZES: dict[str, ModelConfig] = {
    "llama-7b": _LLAMA_1,
    "llama-13b": dataclasses.replace(_LLAMA_1, **_13B),
    "llama2-7b": _LLAMA_2,
    "llama2-13b": dataclasses.replace(_LLAMA_2, **_13B),
    "llama2-70b": dataclasses.replace(_LLAMA_2, **_70B),
    "llama3-8b": _LLAMA_3,
    "llama3-70b": dataclasses.replace(_LLAMA_3, **_70B),
    "llama3.1-8b": _LLAMA_31,
    "llama3.1-70b": dataclasses.replace(_LLAMA_31, **_70B),
    "llama3.2-1b": dataclasses.replace(_LLAMA_32, embed=2048, mlp=8192, layers=16, head_dim=64),
    "llama3.2-3b": dataclasses.replace(_LLAMA_32, embed=3072, mlp=8192, layers=28, heads=24),
    "llama3.3-70b": dataclasses.replace(_LLAMA_31, **_70B, eos_ids=(128001, 128008, 128009)),  # instruct only
    "tinyllama-1.1b": ModelConfig(32000, 2048, 5632, 22, 32, 4, 64),
    "smollm2-135m": _SMOLLM2,
    "smollm2-360m": dataclasses.replace(_SMOLLM2, embed=960, mlp=2560, layers=32, heads=15, kv_heads=5),
    "smollm2-1.7b": dataclasses.replace(
        _SMOLLM2, embed=2048, mlp=8192, layers=24, heads=32, kv_heads=32, rope_theta=130_000.0
    ),
    "demo": ModelConfig(1024, 128, 384, 4, 4, 2, 32, tied_head=True, max_length=512),
}
