"""A base with or without an adapter, ready to use from Python: `load(base, adapter)` -> logits and text."""

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from lowrank.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from lowrank.inference.decode import Sampling
from lowrank.inference.text import encode_prompt, stream_text
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.model.products import dot
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.compiling import jit_later
from lowrank.runs.adapter import Adapter, read_adapter
from lowrank.weights.base import read_base
from lowrank.weights.load import load_params


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with its variables and its tokenizer."""

    model: Decoder
    variables: dict
    tokenizer: Tokenizer

    def logits(self, ids) -> jax.Array:
        """int [batch, length] -> float32 [batch, length, vocab]; each row is one text, its first token at position 0."""
        return _logits(self.model, self.variables, jnp.asarray(ids, jnp.int32))

    def encode(self, prompt: str) -> list[int]:
        """BOS + prompt, as in training."""
        return encode_prompt(prompt, "", "text", self.tokenizer)

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int = 256, stop: Sequence[str] = (), **sampling
    ) -> list[str]:
        """The continuation of each prompt, up to EOS, a string of `stop` (left out), or `max_new_tokens`.

        `sampling`: temperature (0: greedy), top_k, top_p, seed.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        texts = [""] * len(prompts)
        for row, piece in self.stream(prompts, max_new_tokens=max_new_tokens, stop=stop, **sampling):
            texts[row] += piece
        return texts

    def stream(
        self, prompts: Sequence[str], *, max_new_tokens: int = 256, stop: Sequence[str] = (), **sampling
    ) -> Iterator[tuple[int, str]]:
        """The same, as it comes: (row, piece of text)."""
        rows = [self.encode(prompt) for prompt in prompts]
        yield from stream_text(
            self.model, self.variables, self.tokenizer, rows, max_new_tokens, stop, Sampling(**sampling)
        )


def load(base, adapter=None, *, dtype: str | None = None, param_dtype: str | None = None, mesh=None) -> Model:
    """Load a base (a checkpoint's folder) and, on top of it, an adapter (a workdir: its latest step; or a PEFT folder;
    or what `read_adapter` gave).

    `dtype`: "float32" or "bfloat16", held and computed in; None is as the checkpoint says (float16 becomes bfloat16,
    which has its range but three bits less). `param_dtype`: what the base is held in, if something else. `mesh`: the devices to lie on; None is one. Raises UserError.
    """
    source = read_base(base)
    if isinstance(adapter, Adapter) and adapter.step is None:
        adapter = adapter.folder  # of PEFT, whose settings are understood rightly only with the base's number of layers
    opened = adapter is None or isinstance(adapter, Adapter)
    adapted = adapter if opened else read_adapter(adapter, layers=source.config.layers)
    dtype = jnp.dtype(dtype or ("float32" if source.config.stored_dtype == "float32" else "bfloat16"))
    tokenizer = load_tokenizer((adapted and adapted.tokenizer) or source.folder)
    check_vocab(tokenizer, source.config.vocab, tokenizer.path)
    param_dtype = jnp.dtype(param_dtype or dtype)
    model = Decoder(source.config, None if adapted is None else adapted.lora, dtype, param_dtype)
    shapes, axes = decoder.abstract(model)
    if mesh is not None:
        mesh_lib.check_heads(mesh, source.config.heads, source.config.kv_heads)
        shapes = mesh_lib.laid_out(mesh, axes, shapes)
    if adapted is None:
        variables = {"params": load_params(source, shapes["params"])}
    elif adapted.lora is None:  # the workdir of a full fine-tuning holds the whole model
        variables = jax.tree.map(lambda leaf: leaf.astype(param_dtype), adapted.restore(shapes))
    else:
        lora = adapted.restore({"lora": shapes["lora"]})["lora"]
        variables = {"params": load_params(source, shapes["params"]), "lora": lora}
    if adapted is not None and adapted.base not in (None, source.fingerprint):
        warnings.warn(f"adapter {adapted.folder} was trained over other weights than those in {base}", stacklevel=2)
    return Model(model, variables, tokenizer)


@functools.partial(jit_later, static_argnums=0)
def _logits(model: Decoder, variables: dict, ids: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    hidden, head, _ = model.apply(variables, ids, positions, jnp.ones_like(ids))
    return dot(hidden, head.astype(hidden.dtype))
