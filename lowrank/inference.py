"""A base with or without an adapter, ready to use from Python: `load(base, adapter)` -> logits and text."""

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapters import Adapter, read_adapter
from lowrank.data import examples, prompts
from lowrank.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from lowrank.errors import UserError
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.model.generation import Sampling, generate_ids
from lowrank.model.products import dot
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.compiling import jit_later
from lowrank.weights.base import load_params, read_base


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


def encode_prompt(prompt: str, given: str, format: str, tokenizer: Tokenizer) -> list[int]:
    """A prompt (and, in the alpaca format, its `input`) -> the ids that generation starts from, as in training."""
    return examples.encode_prompt(prompts.format_prompt(format, prompt, given, tokenizer), format, tokenizer)


def complete(model: Decoder, variables: dict, tokenizer: Tokenizer, rows, max_new_tokens: int) -> list[str]:
    """The greedy continuation of each row of ids."""
    texts = [""] * len(rows)
    for row, piece in stream_text(model, variables, tokenizer, rows, max_new_tokens, (), Sampling()):
        texts[row] += piece
    return texts


def question_and_answer(example: examples.Example) -> tuple[list[int], list[int]]:
    """The ids of an example up to its last response, and of that response with what ends it.

    That is the last run of trained tokens: a chat template may write something untrained behind it.
    """
    trained = np.flatnonzero(example.loss_mask)
    end = trained[-1]
    before = np.flatnonzero(~example.loss_mask[: end + 1])
    start = before[-1] + 1 if len(before) else 0
    return example.ids[: start + 1].tolist(), example.ids[start + 1 : end + 2].tolist()  # the mask is over ids[1:]


def answers(
    model: Decoder, variables: dict, tokenizer: Tokenizer, asked_of: list[examples.Example], rows: int
) -> list[tuple[str, str, str]]:
    """(prompt, answer, reference) of each example, answered greedily, `rows` side by side.

    A prompt that leaves the model no room to answer has the answer "".
    """
    given = []
    pairs = [question_and_answer(example) for example in asked_of]
    for start in range(0, len(pairs), rows):
        part = pairs[start : start + rows]
        asked = [prompt for prompt, _ in part if len(prompt) < model.config.max_length]
        longest = max(len(reference) for _, reference in part)  # a longer answer cannot be equal
        texts = iter(complete(model, variables, tokenizer, asked, longest))
        for prompt, reference in part:
            text = next(texts) if len(prompt) < model.config.max_length else ""
            given.append((tokenizer.decode(prompt), text.strip(), tokenizer.decode(reference).strip()))
    return given


def stream_text(
    model: Decoder,
    variables: dict,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    sampling: Sampling,
) -> Iterator[tuple[int, str]]:
    """Continue each row of ids; yield (row, piece of text) until each has met EOS, a stop string or its length."""
    if not rows:
        return
    limit = model.config.max_length
    longest = max(len(prompt) for prompt in rows)
    if longest >= limit:
        raise UserError(f"a prompt of {longest} tokens leaves no room: the model reads {limit}; shorten it")
    if min(len(prompt) for prompt in rows) == 0:
        raise UserError("an empty prompt needs a tokenizer with a BOS token; this one has none: write some text")
    ends = {*model.config.eos_ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])}
    ids: list[list[int]] = [[] for _ in rows]
    sent = [""] * len(rows)
    running = set(range(len(rows)))

    def decode(row: int) -> str:
        return tokenizer.decode(ids[row], continues=len(rows[row]) > 1)  # after BOS alone a text begins

    max_new_tokens = min(max_new_tokens, limit - min(len(prompt) for prompt in rows))
    for tokens in generate_ids(model, variables, rows, max_new_tokens, sampling):
        for row in sorted(running):
            token = int(tokens[row])
            ended = token in ends
            if not ended:
                ids[row].append(token)
                ended = len(rows[row]) + len(ids[row]) >= limit
            text = decode(row)
            met = [at for at in (text.find(string) for string in stop) if at >= 0]
            if met:
                text, ended = text[: min(met)], True
            if not ended:
                text = text[: len(text) - _withheld(text, stop)]
            if len(text) > len(sent[row]):
                yield row, text[len(sent[row]) :]
                sent[row] = text
            if ended:
                running.remove(row)
        if not running:
            return
    for row in sorted(running):  # out of tokens: what was withheld comes now
        text = decode(row)
        if len(text) > len(sent[row]):
            yield row, text[len(sent[row]) :]


def _withheld(text: str, stop: Sequence[str]) -> int:
    """Characters at the end that may change yet: half of a character's bytes, or the beginning of a stop string."""
    broken = len(text) - len(text.rstrip("\ufffd"))
    starts = [n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])]
    return max([broken, *starts])


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
