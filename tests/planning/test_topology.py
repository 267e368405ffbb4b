"""Chips, prices, slices by name, and what the interconnect of a slice gives to a group of its chips."""

import itertools
import math
import types

import pytest

from lowrank.errors import UserError
from lowrank.planning import prices, topology
from lowrank.planning.chips import CHIPS, GIB
from lowrank.planning.topology import Slice, parse_exhausted, parse_name


def slice_of(name: str) -> Slice:
    """With devices that know their places only, the last dimension counted fastest."""
    chip, dimensions = parse_name(name)
    places = itertools.product(*map(range, dimensions))
    return Slice(name, chip, dimensions, [types.SimpleNamespace(coords=(*place, 0)[:3]) for place in places])


def test_the_table_of_chips_is_in_order_and_its_prices_are_of_chips_in_it():
    for chip in CHIPS.values():
        shapes = [parse_name(f"{chip.name}:{shape}")[1] for shape in chip.topologies]
        assert [*map(math.prod, shapes)] == sorted(map(math.prod, shapes))
        assert len({*map(len, shapes)}) == 1
    assert set(prices.PER_CHIP_HOUR) <= set(CHIPS)
    assert CHIPS["v5e"].memory == 15.75 * GIB


def test_a_name_is_a_chip_and_a_slice():
    chip, dimensions = parse_name("v5p:2x2x4")
    assert (chip.name, dimensions, slice_of("v5p:2x2x4").chips) == ("v5p", (2, 2, 4), 16)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e:3x3", "v5e has no such slice; there are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v5e", "v5e has no such slice"),
        ("v6:2x2", r"no chip is called v6 \(did you mean v6e\?\); say CHIP:TOPOLOGY with one of v5e, v6e, v5p, tpu7x"),
        ("h100", "no chip is called h100; say"),
    ],
)
def test_a_name_that_does_not_exist_lists_those_that_do(name, says):
    with pytest.raises(UserError, match=says):
        parse_name(name)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lowrank\[plan\]', or make .venv/.installed EXTRAS=plan"):
        topology.open_slice("v5e:2x2")


@pytest.mark.parametrize(
    ("name", "group", "links"),
    [
        ("v5e:2x4", slice(0, 8), 2),  # both dimensions, neither of them a ring
        ("v5e:2x4", slice(0, 4), 1),  # a row
        ("v5e:16x16", slice(0, 256), 4),  # the whole pod is a torus
        ("v5e:16x16", slice(0, 16), 2),
        ("v5e:16x16", slice(0, 8), 1),  # half a ring
        ("v5e:8x16", slice(0, 128), 3),
        ("v5p:2x2x4", slice(0, 16), 3),  # smaller than a cube of 4x4x4
        ("v5p:4x4x4", slice(0, 64), 6),
        ("v5e:1x1", slice(0, 1), 1),
    ],
)
def test_a_group_has_a_link_along_each_dimension_and_two_where_it_is_a_ring(name, group, links):
    where = slice_of(name)
    assert where.bandwidth(where.devices[group]) == links * where.chip.link


def test_all_chips_of_a_slice_are_a_group():
    for name in ("v5e:2x4", "v5e:8x16", "v5p:4x4x4", "v6e:1x1"):
        assert slice_of(name).bandwidth() == slice_of(name).bandwidth(slice_of(name).devices)


def test_the_sizes_in_a_compilers_message():
    # The first is libtpu 0.0.42's; the second its message for a program whose arguments count.
    one = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (894.07G) exceeds available HBM (15.75G)."
    other = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded"
    assert parse_exhausted(one) == (894.07 * GIB, 15.75 * GIB)
    assert parse_exhausted(other) == (20.5 * GIB, 15.75 * GIB)
    assert parse_exhausted("RESOURCE_EXHAUSTED: something else") is None
