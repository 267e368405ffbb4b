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
    truncated: bool = False  # cut at data.max_length, or into chunks


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
    overflow: str = "truncate",
) -> Examples:
    """Encode records, drop those without a trained token. `path` is for errors.

    `overflow`: what is beyond `max_length` inputs is left out ("truncate") or becomes further examples ("chunk", for `text`).
    """
    if max_length < 2:
        raise UserError(f"data.max_length={max_length} leaves no room for a prompt and a response: set 2 or more")
    if tokenizer.eos_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so a model cannot learn to stop: "
            "name eos_token in the base's tokenizer_config.json"
        )
    examples, dropped = [], 0
    format = one_format(records, path) if format == "auto" else format
    if overflow == "chunk" and format not in ("text", "tokens"):
        raise UserError(f"data.overflow='chunk' is for texts, which can be cut anywhere; data.format is {format!r}")
    for index, ids, trained in _encode(records, format, tokenizer, path):
        mask = np.array(trained[1:], bool) | train_on_prompt
        ids, longer = np.array(ids, np.int32), len(mask) > max_length
        # Each chunk begins with the last id of the one before it, so that every target is trained once.
        starts = range(0, len(mask), max_length) if overflow == "chunk" else [0]
        chunks = [(ids[start : start + max_length + 1], mask[start : start + max_length]) for start in starts]
        kept = [Example(*chunk, index, longer) for chunk in chunks if chunk[1].any()]
        examples += kept
        dropped += not kept
    if not examples:
        raise UserError(
            f"all {dropped} records of {path} have nothing to learn within data.max_length={max_length}: "
            "set a larger one, or data.train_on_prompt"
        )
    return Examples(examples, dropped)


def one_format(records: Sequence[Record], path: paths.PathLike) -> str:
    """The format of all the records. UserError for several."""
    formats = {record.format: record.where for record in records}
    if len(formats) > 1:
        raise UserError(f"the files of {path} are of the formats {', '.join(formats)}; give those of one format")
    return next(iter(formats))


def encode_prompt(text: str, format: str, tokenizer: Tokenizer) -> list[int]:
    """The ids that generation starts from: those that an example of this format begins with."""
    ids = tokenizer.encode_markup([text])[0][0] if format == "chat" else tokenizer.encode(text)
    return [*_bos(ids, tokenizer, format == "chat"), *ids]


def split(examples: Examples, n: int) -> tuple[Examples, Examples]:
    """Training data, and the last `n` examples as evaluation data (more, where one record has given several)."""
    count = len(examples.examples)
    if not 0 < n < count:
        raise UserError(f"data.eval_examples={n} leaves nothing to train on or evaluate: choose 1 to {count - 1}")
    first = examples.examples[-n].index
    train = [example for example in examples.examples if example.index < first]
    if not train:
        raise UserError(f"data.eval_examples={n} leaves nothing to train on: the data is a single record")
    return Examples(train, examples.dropped), Examples(examples.examples[len(train) :])


def _encode(records, format, tokenizer, path) -> Iterator[tuple[int, list[int], list[bool]]]:
    """The index of a record, its ids, and for each id whether it is trained; a chat may give several."""
    if format == "tokens":
        _check_ids(records, tokenizer, path)
        for index, record in enumerate(records):
            ids, labels = record.fields["input_ids"], record.fields["labels"]
            yield index, ids, [label != -100 for label in labels]
        return
    cut, indices, problems = [], [], []
    for index, record in enumerate(records):
        try:
            for parts in segments(record.fields, format, tokenizer):
                cut.append([part for part in parts if part.text] or [Segment("", False)])
                indices.append(index)
        except UserError as error:  # the chat template's
            problems.append((record.where, str(error)))
    refuse(path, problems)
    encoded = (_encode_chats if format == "chat" else _encode_apart)(cut, tokenizer)
    for index, (ids, trained) in zip(indices, encoded, strict=True):
        yield index, ids, trained


def _check_ids(records: Sequence[Record], tokenizer: Tokenizer, path: paths.PathLike) -> None:
    largest = [(record.where, max(record.fields["input_ids"])) for record in records]
    message = f"is beyond the tokenizer's {tokenizer.vocab} tokens"
    refuse(path, [(where, f"id {number} {message}") for where, number in largest if number >= tokenizer.vocab])


def _encode_apart(cut: list[list[Segment]], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """Encode segment by segment, later ones as continuations: together the ids of the whole text."""
    first = tokenizer.encode_batch([parts[0].text for parts in cut])
    later = iter(tokenizer.encode_batch([part.text for parts in cut for part in parts[1:]], continues=True))
    for parts, start in zip(cut, first, strict=True):
        ids: list = _bos(start, tokenizer)
        trained = [False] * len(ids)
        assert tokenizer.eos_id is not None  # `encode_examples` refuses a tokenizer without one
        for i, part in enumerate(parts):
            new = start if i == 0 else next(later)
            end = [tokenizer.eos_id] if part.ends and i < len(parts) - 1 else []
            ids += new + end
            trained += [part.trained] * len(new + end)
        yield [*ids, tokenizer.eos_id], [*trained, True]


def _encode_chats(cut: list[list[Segment]], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """Encode the whole text, as Hugging Face does; a token is trained if it has a trained character."""
    texts = ["".join(part.text for part in parts) for parts in cut]
    for parts, text, (ids, offsets) in zip(cut, texts, tokenizer.encode_markup(texts), strict=True):
        flags = np.repeat([part.trained for part in parts], [len(part.text) for part in parts])
        count = np.append(0, np.cumsum(flags))  # trained characters before each character
        start, end = np.array(offsets, int).reshape(-1, 2).T
        end = np.clip(end, start + 1, len(text))  # of a character in byte tokens only the last one has a width
        bos = _bos(ids, tokenizer, is_chat=True)
        yield bos + ids, [False] * len(bos) + (count[end] > count[start]).tolist()


def _bos(ids: list[int], tokenizer: Tokenizer, is_chat: bool = False) -> list[int]:
    """[BOS], or [] where the tokenizer puts none, or it stands there. In a chat the base's template alone writes it."""
    is_templated = is_chat and tokenizer.chat_template is not None
    return [] if is_templated or tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id]
