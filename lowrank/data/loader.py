"""Batches: endless for training, one pass for evaluation, with a position that can be saved.

Each epoch is a finite Grain pipeline of its own (the examples in that epoch's order, packed into rows), so every epoch holds
every example exactly once, packed or not. A position is the epoch and Grain's state within it, some hundred bytes of JSON.
Every process makes the same batches of all rows and gives its devices their rows, so the order of the data does not depend on
the number of processes. Left out: data that does not fit into memory.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np

from lowrank.data.batch import Batch
from lowrank.data.examples import Examples
from lowrank.data.packing import PADDING, arrays, pack
from lowrank.errors import UserError


class LoadedBatch(NamedTuple):
    """A batch and where its tokens come from."""

    batch: Batch
    examples: np.ndarray  # int32 [B, T], the index of each token's example in its file; -1 for padding


Row = dict[str, np.ndarray]  # Grain's names -> [length]


class TrainLoader:
    """An endless iterator over batches with a position; `train_loader` makes it."""

    def __init__(self, elements: grain.MapDataset, epoch_length: int, made_from: dict):
        self._elements = elements  # endless: epoch after epoch
        self._epoch_length = epoch_length
        self._made_from = made_from
        self._start(0)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> LoadedBatch:
        return _stack([self._next_row() for _ in range(self._made_from["batch_size"])])

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

    def _next_row(self) -> Row:
        try:
            return next(self._rows)
        except StopIteration:
            self._start(self._epoch + 1)
            return next(self._rows)


def train_loader(
    examples: Examples, *, batch_size: int, max_length: int, packing: bool, shuffle: bool, seed: int
) -> TrainLoader:
    """Endless batches [batch_size, max_length]; with `shuffle` each epoch has its own order, drawn from the seed."""
    source = grain.MapDataset.source(examples.examples).seed(seed)
    elements = (source.shuffle() if shuffle else source).repeat().map(arrays)
    made_from = {
        "data": fingerprint(examples),
        "batch_size": batch_size,
        "max_length": max_length,
        "packing": packing,
        "shuffle": shuffle,
        "seed": seed,
    }
    return TrainLoader(elements, len(examples.examples), made_from)


def evaluation_batches(examples: Examples, *, batch_size: int, max_length: int, packing: bool) -> Iterator[LoadedBatch]:
    """Batches that hold every example once, in file order; empty rows (segment id 0, nothing trained) pad the last."""
    rows = pack(grain.MapDataset.source(examples.examples).map(arrays), max_length, packing)
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == batch_size:
            yield _stack(batch)
            batch = []
    if batch:
        empty = {name: np.full_like(array, PADDING.get(name, 0)) for name, array in batch[0].items()}
        yield _stack(batch + [empty] * (batch_size - len(batch)))


def fingerprint(examples: Examples) -> str:
    """Equal for equal ids, masks and order."""
    digest = hashlib.sha256()
    for example in examples.examples:
        digest.update(np.int64([example.index, len(example.ids)]).tobytes())
        digest.update(example.ids.tobytes() + example.loss_mask.tobytes())
    return digest.hexdigest()[:16]


def _stack(rows: list[Row]) -> LoadedBatch:
    inputs, targets, positions, segment_ids, loss_mask, examples = (
        np.stack([row[name] for row in rows])
        for name in ("inputs", "targets", "inputs_positions", "inputs_segment_ids", "loss_mask", "examples")
    )
    return LoadedBatch(Batch(inputs, targets, positions, segment_ids, loss_mask), examples)
