"""Read Meta's own folders (`params.json`, `consolidated.NN.pth`) as Hugging Face's tensors and a ModelConfig.

Three things differ from Hugging Face's files: names; model-parallel shards, each with a part of every matrix; and the
order of the rows of q and k, because Meta's RoPE rotates neighbouring rows and Hugging Face's (and ours) halves.
All three are converted as a part is read: no tensor is ever joined or permuted as a whole.

`params.json` has fewer fields than config.json. The others follow from the generation of Llama, as in transformers' own
conversion (`convert_llama_weights_to_hf.py`).
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from lowrank.errors import UserError
from lowrank.families.config import ModelConfig, RopeScaling
from lowrank.families.tensor_names import is_ignored
from lowrank.files import paths
from lowrank.weights.check import same
from lowrank.weights.tensor_file import Index, Tensor
from lowrank.weights.torch_file import open_torch_file

PARAMS = "params.json"
JOINED = {  # Meta's name -> Hugging Face's, and the axis along which shards are cut (None: whole in each of them)
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
EMBEDDING, FREQUENCIES = "tok_embeddings.weight", "rope.freqs"
FIRST = "layers.0.attention.wq.weight"  # differs between shards, so it shows a shard that is a copy of another
NAME = re.compile(r"(?:layers\.(\d+)\.)?(.+)\.weight")

SIZES = ("dim", "n_layers", "n_heads")  # required, beside norm_eps
OPTIONAL_SIZES = ("n_kv_heads", "vocab_size", "head_dim", "hidden_dim", "sliding_window")  # the last three: Mistral's
# The tensors' shapes tell these, or only Meta's own program uses them.
HARMLESS = ("multiple_of", "ffn_dim_multiplier", "max_batch_size", "max_seq_len", "model_parallel_size")


def open_folder(folder: paths.Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config, and every tensor by Hugging Face's name. Reads headers, norms and a little of the embedding."""
    problems: list[str] = []
    params = _read_params(folder / PARAMS)
    shards = [open_torch_file(file, problems) for file in _files(folder)]
    joined = {} if problems else _join(shards, params["dim"], problems)
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}; fetch the folder again")
    config = _config(params, joined)
    if config.tied_head:
        joined.pop("lm_head.weight", None)
    for layer in range(config.layers):
        for projection, heads in (("q_proj", config.heads), ("k_proj", config.kv_heads)):
            name = f"model.layers.{layer}.self_attn.{projection}.weight"
            if name in joined and joined[name].shape[0] == heads * config.head_dim:  # else `check` reports its shape
                joined[name] = halves_first(joined[name], config.head_dim)
    return config, joined


def _files(folder: paths.Path) -> list[paths.Path]:
    """The shards, in order and without gaps."""
    files: list[paths.Path] = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise UserError(f"{folder}: has {PARAMS} but no consolidated.00.pth; give the folder with the weights")
    expected = [folder / f"consolidated.{i:02}.pth" for i in range(len(files))]
    if files != expected:
        missing = sorted({file.name for file in expected} - {file.name for file in files})
        raise UserError(f"{folder}: {', '.join(missing)} missing among {len(files)} shards; fetch the folder again")
    return files


def _join(shards: list[dict[str, Tensor]], dim: int, problems: list[str]) -> dict[str, Tensor]:
    """Tensors by Hugging Face's names, joined from their parts in the shards."""
    joined: dict[str, Tensor] = {}
    for name in sorted(set().union(*shards)):
        if name == FREQUENCIES or is_ignored(name):  # computed from the config
            continue
        lacking = [f"{i:02}" for i, shard in enumerate(shards) if name not in shard]
        match = NAME.fullmatch(name)
        if lacking:
            problems.append(f"{name} is missing in shard {', '.join(lacking)}")
        elif name == EMBEDDING:
            # Llama 1 and 2 split the embedding's columns, Llama 3 its rows: a part as wide as the model holds rows.
            axis: int | None = 0 if shards[0][EMBEDDING].shape[1:] == (dim,) else 1
            _add(joined, "model.embed_tokens.weight", shards, name, axis, problems)
        elif match and match[2] in JOINED and (match[1] is None) == (match[2] in ("norm", "output")):
            hf, axis = JOINED[match[2]]
            hf = hf if match[1] is None else f"model.layers.{match[1]}.{hf}"
            _add(joined, f"{hf}.weight", shards, name, axis, problems)
        else:
            problems.append(f"{name} is no tensor of a Llama")
    return joined


def _add(joined: dict, hf: str, shards: list[dict[str, Tensor]], name: str, axis: int | None, problems: list[str]):
    parts = [shard[name] for shard in shards]
    shapes = sorted({part.shape for part in parts})
    rank = 1 if axis is None else 2
    if len(shapes) > 1 or len(shapes[0]) != rank or len({part.dtype for part in parts}) > 1:
        problems.append(f"{name} is {' and '.join(str(list(shape)) for shape in shapes)} in different shards")
    elif axis is None:
        if any(part.whole().tobytes() != parts[0].whole().tobytes() for part in parts[1:]):
            problems.append(f"{name} is not the same in all shards")
        joined[hf] = parts[0]
    elif name == FIRST and len({part.read((slice(0, 1), slice(0, shapes[0][1]))).tobytes() for part in parts}) < len(
        parts
    ):
        problems.append("two shards hold the same weights instead of each its own")
    else:
        joined[hf] = parts[0] if len(parts) == 1 else concatenated(parts, axis)


def concatenated(parts: list[Tensor], axis: int) -> Tensor:
    """Tensors of one shape, joined along an axis as they are read."""
    own = parts[0].shape[axis]
    shape = tuple(size * len(parts) if i == axis else size for i, size in enumerate(parts[0].shape))

    def within(index: Index) -> Iterator[tuple[Tensor, Index]]:
        """The parts that the index touches, and where in each."""
        for number, part in enumerate(parts):
            start = max(index[axis].start - number * own, 0)
            stop = min(index[axis].stop - number * own, own)
            if start < stop:
                yield part, (*index[:axis], slice(start, stop), *index[axis + 1 :])

    def read(index: Index) -> np.ndarray:
        found = [part.read(own_index) for part, own_index in within(index)]
        return found[0] if len(found) == 1 else np.concatenate(found, axis)

    def expect(index: Index) -> None:
        for part, own_index in within(index):
            part.expect(own_index)

    return Tensor(shape, parts[0].dtype, read, expect)


def halves_first(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k in Hugging Face's order: of each head the even rows first, then the odd ones.

    Meta rotates rows 2i and 2i + 1 by the i-th angle, Hugging Face rows i and i + head_dim / 2.
    """

    def whole_heads(rows: slice) -> slice:
        return slice(rows.start // head_dim * head_dim, -(-rows.stop // head_dim) * head_dim)

    def read(index: Index) -> np.ndarray:
        rows, columns = index
        found = whole_heads(rows)
        heads = tensor.read((found, columns))
        heads = heads.reshape(-1, head_dim // 2, 2, heads.shape[1]).swapaxes(1, 2).reshape(heads.shape)
        return np.ascontiguousarray(heads[rows.start - found.start : rows.stop - found.start])

    def expect(index: Index) -> None:
        tensor.expect((whole_heads(index[0]), index[1]))

    return Tensor(tensor.shape, tensor.dtype, read, expect)


def _read_params(path: paths.Path) -> dict[str, Any]:
    """The fields that are not null. UserError lists all that are missing, wrong or not supported."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        fields = {name: value for name, value in found.items() if value is not None}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a JSON object ({error}); fetch the file again") from None
    if fields.get("vocab_size") == -1:
        del fields["vocab_size"]  # Llama 1 and 2: the tokenizer's
    is_size = lambda value: type(value) is int and value > 0  # noqa: E731
    is_number = lambda value: type(value) in (int, float) and 0 < value < math.inf  # noqa: E731
    problems = [f"{name} is missing" for name in (*SIZES, "norm_eps") if name not in fields]
    for name, value in fields.items():
        if name in SIZES + OPTIONAL_SIZES:
            wrong = "not a positive integer" if not is_size(value) else None
        elif name in ("norm_eps", "rope_theta"):
            wrong = "not a positive number" if not is_number(value) else None
        elif name == "use_scaled_rope":
            wrong = "not true or false" if not isinstance(value, bool) else None
        else:
            wrong = "not supported" if name not in HARMLESS else None
        if wrong:
            problems.append(f"{name} = {json.dumps(value)} is {wrong}")
    if not problems:
        heads, kv_heads = fields["n_heads"], fields.get("n_kv_heads", fields["n_heads"])
        if "head_dim" not in fields and fields["dim"] % heads:
            problems.append(f"dim {fields['dim']} is no multiple of n_heads {heads}")
        if heads % kv_heads:
            problems.append(f"n_heads {heads} is no multiple of n_kv_heads {kv_heads}")
        if fields.get("head_dim", fields["dim"] // heads) % 2:
            problems.append("head_dim is odd, RoPE rotates pairs")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}; mend it or give another base")
    return fields


def _config(params: dict[str, Any], tensors: dict[str, Tensor]) -> ModelConfig:
    """The config from the fields, and from the tensors' shapes where the fields leave it open."""
    embedding, head = tensors.get("model.embed_tokens.weight"), tensors.get("lm_head.weight")
    gate = tensors.get("model.layers.0.mlp.gate_proj.weight")
    dim, heads, layers = (params[name] for name in ("dim", "n_heads", "n_layers"))
    vocab = params.get("vocab_size") or (embedding.shape[0] if embedding else 1)
    config = ModelConfig(
        vocab=vocab,
        embed=dim,
        mlp=gate.shape[0] if gate else params.get("hidden_dim", 1),
        layers=layers,
        heads=heads,
        kv_heads=params.get("n_kv_heads", heads),
        head_dim=params.get("head_dim", dim // heads),
        norm_eps=float(params["norm_eps"]),
        rope_theta=float(params.get("rope_theta", 10_000.0)),
        # Meta's Llama 3.2 stores the one matrix twice; without a head the embedding is the head.
        tied_head=head is None or (embedding is not None and same(embedding, head)),
        max_length=_max_length(params),
        stored_dtype=embedding.dtype.name if embedding else "bfloat16",
        windows=(params["sliding_window"],) * layers if "sliding_window" in params else (),
        family="mistral" if "hidden_dim" in params else "llama",
    )
    if params.get("use_scaled_rope"):
        # Llama 3.1 and 3.3 scale by 8, the two small models of 3.2 by 32: params.json does not say.
        factor = 32.0 if dim <= 3072 else 8.0
        config = dataclasses.replace(config, rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192))
    if vocab >= 128_256:  # Llama 3; base and instruct models look alike here, so EOS is whatever ends a turn or a text
        ends = (128_001, 128_008, 128_009) if params.get("use_scaled_rope") else (128_001, 128_009)
        config = dataclasses.replace(config, bos_id=128_000, eos_ids=ends)
    return config


def _max_length(params: dict[str, Any]) -> int:
    """The positions that the model was trained for, by its generation, which the fields show."""
    if params.get("use_scaled_rope"):
        return 131_072  # 3.1, 3.2, 3.3
    if "hidden_dim" in params:
        return 32_768  # Mistral
    if params.get("rope_theta", 10_000.0) == 500_000.0:
        return 8192  # 3
    if params.get("rope_theta", 10_000.0) > 10_000.0:
        return 16_384  # Code Llama
    first = params["norm_eps"] == 1e-6 or (params["dim"] == 8192 and "n_kv_heads" not in params)  # the second is 65B
    return 2048 if first else 4096
