"""Batches: endless for training, one pass for evaluation, with a position that can be saved.

Each epoch is a finite Grain pipeline of its own (the examples in that epoch's order, packed into rows), so every epoch holds
every example exactly once, packed or not. A position is the epoch and Grain's state within it, some hundred bytes of JSON.
Every process makes the same batches of all rows and gives its devices their rows, so the order of the data does not depend on
the number of processes.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from lowrank.data.batch import Batch
from lowrank.data.examples import Columns, Examples
from lowrank.data.packing import PADDING, arrays, pack
from lowrank.errors import UserError


class LoadedBatch(NamedTuple):
    """A batch and where its tokens come from."""

    batch: Batch
    examples: np.ndarray  # int32 [B, T], the index of each token's example in its file; -1 for padding


class TrainLoader:
    """Endless batches [batch_size, max_length], with a position; with `shuffle` each epoch has its own order, drawn from
    the seed."""

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        max_length: int,
        packing: bool,
        shuffle: bool,
        seed: int,
        mixture: Sequence[float] = (),
    ):
        self._made_from: dict = {"data": fingerprint(examples), "batch_size": batch_size, "max_length": max_length}
        self._made_from |= {"packing": packing, "shuffle": shuffle, "seed": seed}
        sources = _sources(examples) if mixture else [examples.examples]
        endless = []  # epoch after epoch
        for number, source in enumerate(sources):
            elements = grain.MapDataset.source(source).seed(seed + number)
            endless.append((elements.shuffle() if shuffle else elements).repeat())
        self._elements = (grain.MapDataset.mix(endless, mixture) if mixture else endless[0]).map(arrays)
        self._epoch_length = len(examples.examples)
        self._start(0)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> LoadedBatch:
        rows: list[dict] = []
        while len(rows) < self._made_from["batch_size"]:
            try:
                rows.append(next(self._rows))
            except StopIteration:
                self._start(self._epoch + 1)
        return _stack(rows)

    def get_state(self) -> dict:
        """The position after the last batch, as JSON."""
        return {"made_from": self._made_from, "epoch": self._epoch, "rows": self._rows.get_state()}

    def set_state(self, state: dict) -> None:
        """Go to a position that `get_state` gave; UserError if that loader had other data or settings."""
        before = state["made_from"]
        now = self._made_from.items()
        changed = [f"{key} was {before.get(key)}, is {value}" for key, value in now if before.get(key) != value]
        if changed:
            raise UserError(f"cannot resume amid other data ({'; '.join(changed)}): undo that or use a new workdir")
        self._start(state["epoch"])
        self._rows.set_state(state["rows"])

    def _start(self, epoch: int) -> None:
        self._epoch = epoch
        elements = self._elements[epoch * self._epoch_length : (epoch + 1) * self._epoch_length]
        self._rows = iter(pack(elements, self._made_from["max_length"], self._made_from["packing"]))


def evaluation_batches(examples: Examples, *, batch_size: int, max_length: int, packing: bool) -> Iterator[LoadedBatch]:
    """Batches that hold every example once, in file order; empty rows (segment id 0, nothing trained) pad the last."""
    rows = iter(pack(grain.MapDataset.source(examples.examples).map(arrays), max_length, packing))
    while batch := list(itertools.islice(rows, batch_size)):
        empty = {name: np.full_like(array, PADDING.get(name, 0)) for name, array in batch[0].items()}
        yield _stack(batch + [empty] * (batch_size - len(batch)))


def epoch_lengths(examples: Examples, mixture: Sequence[float] = ()) -> np.ndarray:
    """int64 [examples]: the inputs of each example of an epoch. With `mixture`, weights of the sources, an epoch has
    as many examples as the data, of each source its share: some are read more often than once, others less."""
    lengths = examples.examples.lengths
    if not mixture:
        return lengths
    shares = np.rint(np.array(mixture) / sum(mixture) * len(lengths)).astype(int)
    drawn = [np.resize(source.lengths, share) for source, share in zip(_sources(examples), shares, strict=True)]
    return np.random.default_rng(0).permutation(np.concatenate(drawn))


def _sources(examples: Examples) -> list[Columns]:
    ends = np.cumsum(examples.sources).tolist()
    return [examples.examples[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def fingerprint(examples: Examples) -> str:
    """Equal for equal ids, masks and order."""
    digest = hashlib.sha256()
    for example in examples.examples:
        digest.update(np.int64([example.index, len(example.ids)]).tobytes())
        digest.update(example.ids.tobytes() + example.loss_mask.tobytes())
    return digest.hexdigest()[:16]


def _stack(rows: list[dict[str, np.ndarray]]) -> LoadedBatch:
    """Rows of Grain's names -> [length], as a batch."""
    names = ("inputs", "targets", "inputs_positions", "inputs_segment_ids", "loss_mask", "examples")
    *batch, examples = (np.stack([row[name] for row in rows]) for name in names)
    return LoadedBatch(Batch(*batch), examples)
