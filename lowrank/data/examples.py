"""A record becomes an example: the ids of BOS + prompt + response + EOS, and a mask of what is learnt.

One idea: a model that has read ids[:-1] predicts ids[1:], so the mask belongs to the *targets*: the first True is
the response's first token, predicted from the prompt's last; the last True is EOS, without which the model would
never learn to stop. Prompt and response are encoded apart, so the prompt has the ids it will have in generation.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from lowrank.data.prompts import Segment, segments
from lowrank.data.records import Record, refuse
from lowrank.data.tokenizer import Tokenizer
from lowrank.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """ids: int32 [n]; loss_mask: bool [n - 1], over the targets ids[1:]; index: which record of its file, from 0."""

    ids: np.ndarray
    loss_mask: np.ndarray
    index: int
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Examples:
    """What can be trained on, in file order, and how many records could not (`dropped`: no trained token fits)."""

    examples: list[Example]
    dropped: int = 0

    @property
    def truncated(self) -> int:
        return sum(example.truncated for example in self.examples)

    @property
    def tokens(self) -> int:
        """Inputs, which is also targets: the positions an epoch computes, without padding."""
        return sum(len(example.loss_mask) for example in self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(int(example.loss_mask.sum()) for example in self.examples)


def encode_examples(
    records: Sequence[Record],
    format: str,
    tokenizer: Tokenizer,
    max_length: int,
    train_on_prompt: bool = False,
    path: str | pathlib.Path = "the data",
) -> Examples:
    """Encode records, cut them to `max_length` inputs at the response's end, and drop those with nothing left to learn.

    `path` names the file in errors.
    """
    if max_length < 2:
        raise UserError(f"data.max_length={max_length} leaves no room for a prompt and a response: make it 2 or more")
    if tokenizer.eos_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so a model cannot learn to stop: "
            "name eos_token in the base's tokenizer_config.json"
        )
    examples, dropped = [], 0
    for index, (ids, trained) in enumerate(_encode(records, format, tokenizer, path)):
        mask = np.array(trained[1:], bool) | train_on_prompt
        truncated = len(mask) > max_length
        ids, mask = np.array(ids[: max_length + 1], np.int32), mask[:max_length]
        if mask.any():
            examples.append(Example(ids, mask, index, truncated))
        else:
            dropped += 1
    if not examples:
        raise UserError(
            f"all {dropped} records of {path} have nothing to learn within data.max_length={max_length}: "
            "make it larger, or set data.train_on_prompt"
        )
    return Examples(examples, dropped)


def encode_prompt(text: str, format: str, tokenizer: Tokenizer) -> list[int]:
    """The ids generation starts from: those an example of this format begins with."""
    ids = tokenizer.encode_markup([text])[0][0] if format == "chat" else tokenizer.encode(text)
    return [*_bos(ids, tokenizer), *ids]


def split(examples: Examples, n: int) -> tuple[Examples, Examples]:
    """The last `n` examples of the file become evaluation data: always the same ones."""
    count = len(examples.examples)
    if not 0 < n < count:
        raise UserError(f"data.eval_examples={n} leaves nothing to train on or evaluate: choose 1 to {count - 1}")
    return Examples(examples.examples[:-n], examples.dropped), Examples(examples.examples[-n:])


def _encode(records, format, tokenizer, path) -> Iterator[tuple[list[int], list[bool]]]:
    """Each record's ids and, beside each id, whether it is trained."""
    cut, problems = [], []
    for record in records:
        try:
            parts = [part for part in segments(record.fields, format, tokenizer) if part.text]
            cut.append(parts or [Segment("", False)])
        except UserError as error:  # the chat template's
            problems.append((record.where, str(error)))
    refuse(path, problems)
    return (_encode_chats if format == "chat" else _encode_apart)(cut, tokenizer)


def _encode_apart(cut: list[list[Segment]], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """Segment by segment, the later ones as continuations: together they give the ids of the whole text."""
    first = tokenizer.encode_batch([parts[0].text for parts in cut])
    later = iter(tokenizer.encode_batch([part.text for parts in cut for part in parts[1:]], continues=True))
    for parts, start in zip(cut, first, strict=True):
        ids = _bos(start, tokenizer)
        trained = [False] * len(ids)
        for part in parts:
            new = start if part is parts[0] else next(later)
            ids += new
            trained += [part.trained] * len(new)
        yield [*ids, tokenizer.eos_id], [*trained, True]


def _encode_chats(cut: list[list[Segment]], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """The whole text at once, as Hugging Face does; a token is trained if it holds a trained character."""
    texts = ["".join(part.text for part in parts) for parts in cut]
    for parts, text, (ids, offsets) in zip(cut, texts, tokenizer.encode_markup(texts), strict=True):
        flags = np.repeat([part.trained for part in parts], [len(part.text) for part in parts])
        count = np.append(0, np.cumsum(flags))  # trained characters before each character
        start, end = np.array(offsets, int).reshape(-1, 2).T
        end = np.clip(end, start + 1, len(text))  # of a character spelt in bytes only the last has a width
        bos = _bos(ids, tokenizer)
        yield bos + ids, [False] * len(bos) + (count[end] > count[start]).tolist()


def _bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """What to put before ids: nothing if there is no BOS, or if a chat template has written it already."""
    return [] if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id]
