"""Encode records as examples: the ids of BOS + prompt + response + EOS, and a loss mask.

One idea: a model that has read ids[:-1] predicts ids[1:], so the mask belongs to the *targets*: the first True is the
response's first token, predicted from the prompt's last; the last True is EOS, which teaches the model to stop. Prompt and
response are encoded separately, so the prompt has the same ids as in generation.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from lowrank.data.prompts import Segment, segments
from lowrank.data.records import Record, refuse
from lowrank.data.tokenizer import Tokenizer
from lowrank.errors import UserError
from lowrank.files import paths


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """ids: int32 [n]; loss_mask: bool [n - 1], over the targets ids[1:]; index: which record of its file, from 0."""

    ids: np.ndarray
    loss_mask: np.ndarray
    index: int
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples in file order, and how many records were dropped because no trained token fits."""

    examples: list[Example]
    dropped: int = 0

    @property
    def truncated(self) -> int:
        return sum(example.truncated for example in self.examples)

    @property
    def tokens(self) -> int:
        """Inputs (and so targets) of an epoch, without padding."""
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
    path: paths.PathLike = "the data",
) -> Examples:
    """Encode records, truncate them to `max_length` inputs, drop those without a trained token. `path` is for errors."""
    if max_length < 2:
        raise UserError(f"data.max_length={max_length} leaves no room for a prompt and a response: set 2 or more")
    if tokenizer.eos_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so a model cannot learn to stop: "
            "name eos_token in the base's tokenizer_config.json"
        )
    cut, problems = [], []
    for record in records:
        try:
            parts = [part for part in segments(record.fields, format, tokenizer) if part.text]
            cut.append(parts or [Segment("", False)])
        except UserError as error:  # the chat template's
            problems.append((record.where, str(error)))
    refuse(path, problems)
    examples, dropped = [], 0
    encode = _encode_chats if format == "chat" else _encode_apart
    for index, (ids, trained) in enumerate(encode(cut, tokenizer)):
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
            "set a larger one, or data.train_on_prompt"
        )
    return Examples(examples, dropped)


def encode_prompt(text: str, format: str, tokenizer: Tokenizer) -> list[int]:
    """The ids that generation starts from: those that an example of this format begins with."""
    ids = tokenizer.encode_markup([text])[0][0] if format == "chat" else tokenizer.encode(text)
    return [*_bos(ids, tokenizer), *ids]


def split(examples: Examples, n: int) -> tuple[Examples, Examples]:
    """Training data, and the last `n` examples as evaluation data."""
    count = len(examples.examples)
    if not 0 < n < count:
        raise UserError(f"data.eval_examples={n} leaves nothing to train on or evaluate: choose 1 to {count - 1}")
    return Examples(examples.examples[:-n], examples.dropped), Examples(examples.examples[-n:])


def _encode_apart(cut: list[list[Segment]], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """Each record's ids, and whether each is trained. Segments are encoded one by one, later ones as continuations:
    together the ids of the whole text."""
    first = tokenizer.encode_batch([parts[0].text for parts in cut])
    later = iter(tokenizer.encode_batch([part.text for parts in cut for part in parts[1:]], continues=True))
    for parts, start in zip(cut, first, strict=True):
        ids: list = _bos(start, tokenizer)
        trained = [False] * len(ids)
        for part in parts:
            new = start if part is parts[0] else next(later)
            ids += new
            trained += [part.trained] * len(new)
        assert tokenizer.eos_id is not None  # `encode_examples` refuses a tokenizer without one
        yield [*ids, tokenizer.eos_id], [*trained, True]


def _encode_chats(cut: list[list[Segment]], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """Encode the whole text, as Hugging Face does; a token is trained if it has a trained character."""
    texts = ["".join(part.text for part in parts) for parts in cut]
    for parts, text, (ids, offsets) in zip(cut, texts, tokenizer.encode_markup(texts), strict=True):
        flags = np.repeat([part.trained for part in parts], [len(part.text) for part in parts])
        count = np.append(0, np.cumsum(flags))  # trained characters before each character
        start, end = np.array(offsets, int).reshape(-1, 2).T
        end = np.clip(end, start + 1, len(text))  # of a character in byte tokens only the last one has a width
        bos = _bos(ids, tokenizer)
        yield bos + ids, [False] * len(bos) + (count[end] > count[start]).tolist()


def _bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """[BOS], or [] where there is none or a chat template has written it."""
    return [] if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id]
