"""Encode records as examples: the ids of BOS + prompt + response + EOS, and a loss mask.

One idea: a model that has read ids[:-1] predicts ids[1:], so the mask belongs to the *targets*: the first True is the
response's first token, predicted from the prompt's last; the last True is EOS, which teaches the model to stop. Prompt and
response are encoded separately, so the prompt has the same ids as in generation.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lowrank.data.prompts import Segment, segments
from lowrank.data.records import Record, refuse
from lowrank.data.tokenizer import Tokenizer
from lowrank.errors import UserError
from lowrank.files import paths

BLOCK = 2000  # records that are encoded at once


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """ids: int32 [n]; loss_mask: bool [n - 1], over the targets ids[1:]; index: which record of its file, from 0."""

    ids: np.ndarray
    loss_mask: np.ndarray
    index: int
    truncated: bool = False  # cut at data.max_length, or into chunks


@dataclasses.dataclass(frozen=True, eq=False)
class Columns(Sequence[Example]):
    """Examples in a few long arrays, which may lie in memory-mapped files: example i is what stands between two bounds."""

    ids: np.ndarray  # integers [all ids]
    trained: np.ndarray  # bool [all ids]: whether the id is a target that is trained, which an example's first never is
    bounds: np.ndarray  # int64 [examples + 1]
    record: np.ndarray  # int32 [examples]: which of its file, from 0
    truncated: np.ndarray  # bool [examples]
    targets: np.ndarray  # int32 [examples]: how many of each are trained

    @classmethod
    def of(cls, examples: Sequence[tuple[list[int], list[bool], int, bool]]) -> "Columns":
        """Of each example its ids, whether each id is trained, its record, and whether it is truncated."""
        bounds = np.cumsum([0, *(len(ids) for ids, *_ in examples)])
        each = itertools.chain.from_iterable
        return cls(
            np.fromiter(each(ids for ids, *_ in examples), np.int32, bounds[-1]),
            np.fromiter(each(trained for _, trained, *_ in examples), bool, bounds[-1]),
            bounds,
            np.array([record for *_, record, _ in examples], np.int32),
            np.array([truncated for *_, truncated in examples], bool),
            np.array([sum(trained) for _, trained, *_ in examples], np.int32),
        )

    @classmethod
    def joined(cls, blocks: Iterable["Columns"]) -> "Columns":
        blocks = [cls.of([]), *blocks]
        lengths = np.concatenate([np.diff(block.bounds) for block in blocks])
        ids, trained, *each = (
            np.concatenate([getattr(block, name) for block in blocks])
            for name in ("ids", "trained", "record", "truncated", "targets")
        )
        return cls(ids, trained, np.append(0, np.cumsum(lengths)), *each)

    def __len__(self) -> int:
        return len(self.record)

    def __getitem__(self, i):
        if isinstance(i, slice):
            start, stop, _ = i.indices(len(self))
            return Columns(
                self.ids, self.trained, self.bounds[start : stop + 1], self.record[i], self.truncated[i], self.targets[i]
            )  # fmt: skip
        i = range(len(self))[i]
        start, stop = self.bounds[i : i + 2]
        ids = self.ids[start:stop].astype(np.int32)
        return Example(ids, self.trained[start + 1 : stop], int(self.record[i]), bool(self.truncated[i]))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples]: the inputs (and so targets) of each."""
        return np.diff(self.bounds) - 1


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples in file order, and how many records were dropped because no trained token fits.

    `sources`: how many of the examples come from each file (folder, pattern) of several.
    """

    examples: Columns
    dropped: int = 0
    sources: tuple[int, ...] = ()

    @property
    def truncated(self) -> int:
        return int(self.examples.truncated.sum())

    @property
    def tokens(self) -> int:
        """Inputs (and so targets) of an epoch, without padding."""
        return int(self.examples.lengths.sum())

    @property
    def trained_tokens(self) -> int:
        return int(self.examples.targets.sum())


def encode_examples(
    records: Iterable[Record],
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
    records = list(records)
    format = one_format(records, path) if format == "auto" else format
    blocks = encode_blocks(records, format, tokenizer, max_length, train_on_prompt, path, overflow)
    return of_records(Columns.joined(blocks), [len(records)], path, max_length)


def of_records(examples: Columns, counts: Sequence[int], path: paths.PathLike, max_length: int) -> Examples:
    """The examples of as many records of each source as `counts` says. UserError where none is left."""
    if not len(examples):
        raise UserError(
            f"all {sum(counts)} records of {path} have nothing to learn within data.max_length={max_length}: "
            "set a larger one, or data.train_on_prompt"
        )
    sources = np.diff(np.searchsorted(examples.record, np.cumsum(counts)), prepend=0)
    return Examples(examples, sum(counts) - len(np.unique(examples.record)), tuple(sources.tolist()))


def encode_blocks(
    records: Iterable[Record],
    format: str,
    tokenizer: Tokenizer,
    max_length: int,
    train_on_prompt: bool = False,
    path: paths.PathLike = "the data",
    overflow: str = "truncate",
    share: tuple[int, int] = (0, 1),
) -> Iterator[Columns]:
    """The examples of each `BLOCK` of records; of `share` (i, n) only block i of every n is encoded, the others are empty.

    UserError at the end for all records that the chat template refuses.
    """
    if max_length < 2:
        raise UserError(f"data.max_length={max_length} leaves no room for a prompt and a response: set 2 or more")
    if tokenizer.eos_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so a model cannot learn to stop: "
            "name eos_token in the base's tokenizer_config.json"
        )
    if overflow == "chunk" and format not in ("text", "tokens"):
        raise UserError(f"data.overflow='chunk' is for texts, which can be cut anywhere; data.format is {format!r}")
    problems: list[tuple[str, str]] = []
    records = iter(records)
    for number in itertools.count():
        if not (block := list(itertools.islice(records, BLOCK))):
            break
        encoded = _encode(block, format, tokenizer, problems) if number % share[1] == share[0] else ()
        examples = [
            (part, trained, number * BLOCK + index, len(ids) - 1 > max_length)
            for index, ids, flags in encoded
            for part, trained in _cut(ids, flags, max_length, overflow, train_on_prompt)
        ]
        if not problems:
            yield Columns.of(examples)
    refuse(path, problems)


def _cut(ids: list[int], flags: list[bool], max_length: int, overflow: str, train_on_prompt: bool) -> Iterator:
    """One example, or several chunks, of at most `max_length` inputs: ids, and whether each is a trained target. Those without
    a trained target are left out."""
    # Each chunk begins with the last id of the one before it, so that every target is trained once.
    for start in range(0, len(ids) - 1, max_length) if overflow == "chunk" else [0]:
        part, trained = ids[start : start + max_length + 1], flags[start : start + max_length + 1]
        if train_on_prompt:
            trained = [True] * len(part)
        trained[0] = False
        if True in trained:
            yield part, trained


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
    columns, count = examples.examples, len(examples.examples)
    if not 0 < n < count:
        raise UserError(
            f"data.eval_examples={n} leaves nothing to train on: the data has {count} examples; choose fewer (0: none is held out)"
        )
    kept = int(np.searchsorted(columns.record, columns.record[-n]))
    if not kept:
        raise UserError(f"data.eval_examples={n} leaves nothing to train on: the data is a single record")
    ends = np.minimum(np.cumsum(examples.sources, dtype=int), kept)
    sources = tuple(np.diff(ends, prepend=0).tolist())
    return Examples(columns[:kept], examples.dropped, sources), Examples(columns[kept:])


def count_contained(held_out: Examples, examples: Examples) -> int:
    """How many held-out examples are among the examples, id by id."""
    theirs, ours = held_out.examples, examples.examples
    # The last ids and the length tell nearly all apart; those that they do not are compared whole.
    candidates = np.flatnonzero(np.isin(_tails(ours), np.unique(_tails(theirs))))
    texts = {(example.ids.tobytes(), example.loss_mask.tobytes()) for example in map(ours.__getitem__, candidates)}
    return sum((example.ids.tobytes(), example.loss_mask.tobytes()) in texts for example in theirs)


def _tails(examples: Columns) -> np.ndarray:
    """uint64 [examples]: a hash of the last ids and the length of each."""
    found = np.diff(examples.bounds).astype(np.uint64)
    for back in range(1, 9):
        at = np.maximum(examples.bounds[1:] - back, examples.bounds[:-1])
        found = found * np.uint64(0x9E3779B97F4A7C15) + examples.ids[at].astype(np.uint64)
    return found


def _encode(
    records: Sequence[Record], format: str, tokenizer: Tokenizer, problems: list[tuple[str, str]]
) -> Iterator[tuple[int, list[int], list[bool]]]:
    """The index of a record, its ids, and for each id whether it is trained; a chat may give several. What the tokenizer or
    its template refuses joins `problems`."""
    if format == "tokens":
        for index, record in enumerate(records):
            ids, labels = record.fields["input_ids"], record.fields["labels"]
            if max(ids) >= tokenizer.vocab:
                problems.append((record.where, f"id {max(ids)} is beyond the tokenizer's {tokenizer.vocab} tokens"))
            yield index, ids, [label != -100 for label in labels]
        return
    cut, indices = [], []
    for index, record in enumerate(records):
        try:
            for parts in segments(record.fields, format, tokenizer):
                cut.append([part for part in parts if part.text] or [Segment("", False)])
                indices.append(index)
        except UserError as error:  # the chat template's
            problems.append((record.where, str(error)))
    encoded = (_encode_chats if format == "chat" else _encode_apart)([] if problems else cut, tokenizer)
    for index, (ids, trained) in zip(indices, encoded, strict=False):
        yield index, ids, trained


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
