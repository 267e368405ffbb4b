"""TODO inference.text"""

from collections.abc import Iterator, Sequence

from lowrank.data import examples, prompts
from lowrank.data.tokenizer import Tokenizer
from lowrank.errors import UserError
from lowrank.inference.decode import Sampling, generate_ids
from lowrank.model.decoder import Decoder


def encode_prompt(prompt: str, given: str, format: str, tokenizer: Tokenizer) -> list[int]:
    """A prompt (and, in the alpaca format, its `input`) -> the ids that generation starts from, as in training."""
    return examples.encode_prompt(prompts.format_prompt(format, prompt, given, tokenizer), format, tokenizer)


def complete(model: Decoder, variables: dict, tokenizer: Tokenizer, rows, max_new_tokens: int) -> list[str]:
    """The greedy continuation of each row of ids."""
    texts = [""] * len(rows)
    for row, piece in stream_text(model, variables, tokenizer, rows, max_new_tokens, (), Sampling()):
        texts[row] += piece
    return texts


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
