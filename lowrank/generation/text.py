"""Text from a decoder: prompts are encoded, continued side by side and decoded as they grow."""

from collections.abc import Iterator, Sequence

from lowrank.data import chat, examples, prompts
from lowrank.data.tokenizer import Tokenizer
from lowrank.errors import HALF_CHARACTER, UserError
from lowrank.generation.decode import Sampling, generate_ids
from lowrank.model.decoder import Decoder


def encode_prompt(prompt: str, input: str, format: str, tokenizer: Tokenizer, system: str | None = None) -> list[int]:
    """A prompt (with `input` and a system message) -> the ids that generation starts from, as in training."""
    refuse_half_characters(prompt, input, system or "")
    return examples.encode_prompt(prompts.format_prompt(format, prompt, input, tokenizer, system), format, tokenizer)


def refuse_half_characters(*texts: str) -> None:
    """UserError for half a character (a lone surrogate), as a file that is not UTF-8 or a cut JSON escape leaves."""
    if halves := [match[0] for text in texts for match in HALF_CHARACTER.finditer(text)]:
        raise UserError(
            f"the prompt holds half a character ({halves[0]!a}), which no tokenizer knows; write it as UTF-8"
        )


def complete(
    model: Decoder, variables: dict, tokenizer: Tokenizer, rows: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """The greedy continuation of each row of ids."""
    texts = [""] * len(rows)
    for row, piece in stream_text(model, variables, tokenizer, rows, max_new_tokens, (), Sampling()):
        texts[row] += piece
    return texts


def check_options(max_new_tokens: int, stop: str | Sequence[str]) -> Sequence[str]:
    """-> the texts of `stop`. UserError for what would end every text."""
    stop = (stop,) if isinstance(stop, str) else stop
    if "" in stop:
        raise UserError("stop holds an empty text, which every text contains; leave it out")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    return stop


def stream_text(
    model: Decoder,
    variables: dict,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    sampling: Sampling,
) -> Iterator[tuple[int, str]]:
    """Continue each row of ids; yield (row, piece of text) until each has met what ends a text or a turn, a stop string or
    its length."""
    if not rows:
        return
    stop = check_options(max_new_tokens, stop)
    limit, lengths = model.config.max_length, [len(prompt) for prompt in rows]
    if max(lengths) >= limit:
        raise UserError(f"a prompt of {max(lengths)} tokens leaves no room: the model reads {limit}; shorten it")
    if min(lengths) == 0:
        raise UserError("an empty prompt needs a tokenizer with a BOS token; this one has none: write some text")
    ends = {*model.config.eos_ids, *chat.end_ids(tokenizer), *(tokenizer.markers.get(text) for text in stop)}
    ids: list[list[int]] = [[] for _ in rows]
    sent = [0] * len(rows)  # characters of each row's text that were yielded
    running = list(range(len(rows)))
    max_new_tokens = min(max_new_tokens, limit - min(lengths))
    for count, tokens in enumerate(generate_ids(model, variables, rows, max_new_tokens, sampling), start=1):
        for row in list(running):
            token = int(tokens[row])
            if token not in ends:
                ids[row].append(token)
            ended = token in ends or lengths[row] + count >= limit
            text = tokenizer.decode(ids[row], continues=lengths[row] > 1)  # after BOS alone a text begins
            if met := [text.index(string) for string in stop if string in text]:
                text, ended = text[: min(met)], True
            if not ended and count < max_new_tokens:
                # What may still change: part of a character's bytes, or the beginning of a stop string.
                starts = [n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])]
                text = text[: min(len(text.rstrip("\ufffd")), len(text) - max(starts, default=0))]
            if len(text) > sent[row]:
                yield row, text[sent[row] :]
                sent[row] = len(text)
            if ended:
                running.remove(row)
        if not running:
            return
