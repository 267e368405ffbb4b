"""A base with or without an adapter, ready to use from Python: `load(base, adapter)` -> logits and text."""

import dataclasses
import functools
import json
import warnings
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lowrank.data import examples
from lowrank.data.chat import format_chat
from lowrank.data.records import check_messages
from lowrank.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from lowrank.generation.decode import Sampling
from lowrank.generation.text import encode_prompt, refuse_half_characters, stream_text
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.model.products import dot
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.compiling import lazy_jit
from lowrank.runs.adapter import Adapter, read_adapter, refuse_step_of_none
from lowrank.weights.base import Base, read_base
from lowrank.weights.load import load_params

Prompt = str | Sequence[int]  # a text, or the ids that generation starts from


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with its variables and its tokenizer."""

    model: Decoder
    variables: dict
    tokenizer: Tokenizer
    format: str | None = None  # of the prompts that the adapter was trained on, if that is known

    def logits(self, ids: np.ndarray) -> jax.Array:
        """int [B, T] -> float32 [B, T, V]; each row is one text, its first token at position 0."""
        return _logits(self.model, self.variables, jnp.asarray(ids, jnp.int32))

    def encode(
        self, prompt: str | Sequence[dict], input: str = "", format: str = "text", system: str | None = None
    ) -> list[int]:
        """The ids that a prompt in this format (or a chat's messages) starts generation from, as in training.

        `input` is alpaca's; `system` a system message before the prompt.
        """
        if isinstance(prompt, str):
            return encode_prompt(prompt, input, format, self.tokenizer, system)
        return self._encode_chat([*([{"role": "system", "content": system}] if system else []), *prompt])

    def _encode_chat(self, messages: Sequence[dict], tools: list | None = None) -> list[int]:
        refuse_half_characters(json.dumps([messages, tools], ensure_ascii=False, default=str))
        messages = check_messages(messages, tools)
        return examples.encode_prompt(format_chat(messages, self.tokenizer, tools), "chat", self.tokenizer)

    def chat(self, messages: Sequence[dict], tools: list | None = None, **options) -> str:
        """The assistant's next turn after `messages` ({"role", "content"}); `options`: those of `stream`."""
        return self.generate([self._encode_chat(messages, tools)], **options)[0]

    def generate(self, prompts: str | Sequence[Prompt], **options) -> list[str]:
        """The continuation of each prompt; `options`: those of `stream`."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        texts = [""] * len(prompts)
        for row, piece in self.stream(prompts, **options):
            texts[row] += piece
        return texts

    def stream(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 256, stop: Sequence[str] = (), **sampling
    ) -> Iterator[tuple[int, str]]:
        """Continue each prompt, up to the end of a text or of a turn, a string of `stop` (left out), or `max_new_tokens`
        -> (row, piece of text).

        `sampling`: temperature (0: greedy), top_k, top_p, seed, first (the number of the first prompt, by which it draws).
        """
        rows = [self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        options = (max_new_tokens, stop, Sampling(**sampling))
        yield from stream_text(self.model, self.variables, self.tokenizer, rows, *options)


def load(
    base,
    adapter=None,
    *,
    step: int | str | None = None,
    dtype: str | None = None,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Load a base (a checkpoint's folder) and an adapter (a workdir, or a folder of PEFT or mlx-lm), or names on the hub.

    Either may be open already (`read_base`, and `read_adapter` with the base). `step`: which checkpoint of a workdir: a
    number, "best" (by evaluation loss) or "last" (as None). `dtype`: "float32" or "bfloat16", held and computed in; None: as
    the checkpoint is stored (float16 becomes bfloat16, which has its range but three bits less). `param_dtype`: held in, if
    that differs. `mesh`: the devices to lie on; None: one. UserError if it fails.
    """
    refuse_step_of_none(step, adapter)
    source = base if isinstance(base, Base) else read_base(base)
    if adapter is not None and not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter, step, source)
    compute = jnp.dtype(dtype or ("float32" if source.config.stored_dtype == "float32" else "bfloat16"))
    held = jnp.dtype(param_dtype or compute)
    tokenizer = load_tokenizer((adapter and adapter.tokenizer) or source.folder)
    check_vocab(tokenizer, source.config.vocab, tokenizer.path)
    model = Decoder(source.config, adapter and adapter.lora, compute, held)
    shapes, axes = decoder.abstract(model)
    if mesh is not None:
        mesh_lib.check_heads(mesh, source.config.heads, source.config.kv_heads)
        shapes = mesh_lib.with_shardings(mesh, axes, shapes)
    if adapter is not None and adapter.lora is None:  # the workdir of a full fine-tuning holds the whole model
        variables = jax.tree.map(lambda leaf: leaf.astype(held), adapter.restore(shapes))
    else:
        variables = {"params": load_params(source, shapes["params"])}
        if adapter is not None:
            variables |= adapter.restore({"lora": shapes["lora"]})
    if adapter is not None and adapter.base not in (None, source.fingerprint):
        message = f"adapter {adapter.folder} was trained over other weights than those in {source.folder}"
        warnings.warn(message, stacklevel=2)
    return Model(model, variables, tokenizer, adapter and adapter.format)


@functools.partial(lazy_jit, static_argnums=0)
def _logits(model: Decoder, variables: dict, ids: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    hidden, head, _ = model.apply(variables, ids, positions, jnp.ones_like(ids))
    return dot(hidden, head.astype(hidden.dtype))
