"""Batches: nothing leaks, nothing is lost, and a resumed run sees what an uninterrupted one would have."""

import itertools
import json

import numpy as np
import pytest

import lowrank.data.packing
from lowrank.data.examples import Columns, Examples
from lowrank.data.loader import TrainLoader, evaluation_batches
from lowrank.data.packing import packed_rows
from lowrank.errors import UserError

LENGTH = 16


def make(count=30, seed=0):
    """Examples of 1 to 16 inputs whose ids tell them apart."""
    lengths = np.random.default_rng(seed).integers(2, LENGTH + 2, count)
    ids = [[100 * i + k for k in range(n)] for i, n in enumerate(lengths)]
    trained = [[k > (n - 1) // 2 for k in range(n)] for n in lengths]
    return Examples(Columns.of([(*pair, i, False) for i, pair in enumerate(zip(ids, trained, strict=True))]))


def named(loaded) -> dict:
    """The arrays of a loaded batch under their names."""
    return loaded.batch._asdict() | {"examples": loaded.examples}


def loader(examples, packing=True, shuffle=True, seed=0, batch_size=3):
    return TrainLoader(examples, batch_size=batch_size, max_length=LENGTH, packing=packing, shuffle=shuffle, seed=seed)


def seen(batches):
    """Indices of the examples in batches, in order of rows and segments; checks each against what it was made from."""
    found = []
    for batch in map(named, batches):
        for row in range(len(batch["inputs"])):
            segments = batch["segment_ids"][row]
            for segment in range(1, segments.max(initial=0) + 1):
                (at,) = np.nonzero(segments == segment)
                assert at.tolist() == list(range(at[0], at[-1] + 1))
                found.append((batch["examples"][row, at[0]], {name: array[row, at] for name, array in batch.items()}))
    return found


def assert_equal(left, right):
    left, right = named(left), named(right)
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_arrives_whole_and_alone_in_its_segment(packing):
    examples = make()
    found = seen(itertools.islice(loader(examples, packing), 40))
    assert {index for index, _ in found} == set(range(30))
    for index, part in found:
        example = examples.examples[index]
        np.testing.assert_array_equal(part["inputs"], example.ids[:-1])
        np.testing.assert_array_equal(part["targets"], example.ids[1:])
        np.testing.assert_array_equal(part["loss_mask"], example.loss_mask)
        np.testing.assert_array_equal(part["positions"], np.arange(len(example.ids) - 1))
        np.testing.assert_array_equal(part["examples"], np.full(len(example.ids) - 1, index))


@pytest.mark.parametrize("packing", [True, False])
def test_the_form_of_a_batch_and_of_its_padding(packing):
    batch = named(next(loader(make(7), packing, batch_size=3)))
    assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == {
        "inputs": ((3, LENGTH), "int32"),
        "targets": ((3, LENGTH), "int32"),
        "positions": ((3, LENGTH), "int32"),
        "segment_ids": ((3, LENGTH), "int32"),
        "loss_mask": ((3, LENGTH), "bool"),
        "examples": ((3, LENGTH), "int32"),
    }
    padding = batch["segment_ids"] == 0
    assert padding.any()
    assert not batch["loss_mask"][padding].any()
    assert (batch["examples"][padding] == -1).all()
    assert (batch["examples"][~padding] >= 0).all()
    if not packing:
        assert batch["segment_ids"].max() == 1


@pytest.mark.parametrize("packing", [True, False])
def test_each_epoch_holds_the_same_examples_in_another_order(packing):
    order = [index for index, _ in seen(itertools.islice(loader(make(), packing, batch_size=1), 100))]
    epochs = [order[start : start + 30] for start in (0, 30, 60)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(30))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_seeds_differ_and_no_seeds_epoch_is_anothers():
    orders = [[index for index, _ in seen(itertools.islice(loader(make(), False, seed=s), 20))] for s in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0][30:] != orders[2][:30]  # the trap of seed + epoch
    assert orders[0][:30] != orders[2][:30]


def test_without_shuffle_the_order_is_the_files():
    found = seen(itertools.islice(loader(make(), packing=False, shuffle=False), 20))
    assert [index for index, _ in found] == [*range(30), *range(30)]


def test_first_fit_fills_the_first_row_with_room():
    lengths = [10, 8, 6, 8, 16]  # rows of 16: 10 + 6, 8 + 8, 16
    columns = Columns.of([([*range(n + 1)], [False, *[True] * n], i, False) for i, n in enumerate(lengths)])
    examples = Examples(columns)
    (loaded,) = evaluation_batches(examples, batch_size=3, max_length=LENGTH, packing=True)
    assert [sorted(set(row)) for row in loaded.examples.tolist()] == [[0, 2], [1, 3], [4]]
    assert packed_rows(columns.lengths, max_length=LENGTH, packing=True) == (3, 1.0)
    assert packed_rows(columns.lengths, max_length=LENGTH, packing=False) == (5, 0.6)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_resumed_loader_goes_on_exactly_from_every_place(monkeypatch, packing, shuffle):
    monkeypatch.setattr(lowrank.data.packing, "OPEN_ROWS", 4)  # so that an epoch has several rounds of open rows
    whole, batches, states = loader(make(), packing, shuffle), [], []
    for _ in range(16):  # over two epochs when packed, and batches that end amid the open rows
        states.append(json.dumps(whole.get_state()))
        batches.append(next(whole))
    assert json.loads(states[-1])["epoch"] >= (2 if packing else 1)
    assert all(len(state) < 250 for state in states)
    used = loader(make(), packing, shuffle)
    for place in (*range(16), 3):  # forward through all places, then back
        for resumed in (loader(make(), packing, shuffle), used):
            resumed.set_state(json.loads(states[place]))
            assert json.dumps(resumed.get_state()) == states[place]
            for expected in batches[place : place + 4]:
                assert_equal(next(resumed), expected)


def test_a_state_of_other_data_or_settings_is_refused():
    state = loader(make()).get_state()
    with pytest.raises(UserError, match=r"\(data was \w+, is \w+\)"):
        loader(make(seed=1)).set_state(state)
    with pytest.raises(UserError, match=r"\(packing was True, is False; seed was 0, is 1\)"):
        loader(make(), packing=False, seed=1).set_state(state)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_evaluation_covers_every_example_once_whatever_the_batch_size(packing, batch_size):
    batches = list(evaluation_batches(make(), batch_size=batch_size, max_length=LENGTH, packing=packing))
    assert sorted(index for index, _ in seen(batches)) == list(range(30))
    batches = [named(loaded) for loaded in batches]
    assert {batch["inputs"].shape for batch in batches} == {(batch_size, LENGTH)}
    assert sum(int(batch["loss_mask"].sum()) for batch in batches) == make().trained_tokens
    rows, fill = packed_rows(make().examples.lengths, max_length=LENGTH, packing=packing)
    assert len(batches) == -(-rows // batch_size)
    assert (
        sum(int((batch["segment_ids"] > 0).sum()) for batch in batches) == round(fill * rows * LENGTH) == make().tokens
    )
    empty = np.concatenate([batch["segment_ids"] for batch in batches])[rows:]
    assert not empty.any()
    assert (np.concatenate([batch["examples"] for batch in batches])[rows:] == -1).all()


def test_a_file_of_one_example_feeds_a_batch():
    batch = named(next(loader(make(1))))
    assert set(batch["examples"].ravel().tolist()) <= {0, -1}
