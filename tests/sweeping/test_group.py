"""How many members train at once, chosen from the memory at hand."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from lowrank.data.batch import Batch
from lowrank.parallel import mesh
from lowrank.sweeping import grid, group
from lowrank.sweeping.grid import SweepConfig
from lowrank.training import partition
from lowrank.training.step import loss_sum

RANKS = "--config.sweep.lora.rank=(1,2,4,8,16)"


@pytest.fixture(scope="module")
def planned(tiny):
    """A group of five members over the embedded base, on one device or more."""

    @functools.cache
    def planned(*overrides, devices=1):
        whole = mesh.make_mesh
        with mock.patch.object(mesh, "make_mesh", lambda config: whole(config, jax.devices()[:devices])):
            members = grid.read(tiny.removeprefix("--config="), [RANKS, *overrides]).members
            return group.plan(list(members), SweepConfig(), {})

    return planned


def sizes(found, free, platform="gpu", **sweep):
    return group.choose_sizes(found, SweepConfig(**sweep), free, platform)


def test_all_at_once_where_memory_allows_and_one_at_a_time_on_a_cpu(planned):
    found = planned()
    assert (found.size, found.at_once, found.count) == (5, 1, 5)
    assert sizes(found, 10**10) == (5, 5)
    assert sizes(found, 10**10, "cpu") == (5, 1)


def test_less_memory_means_fewer_at_once_and_then_parts(planned, monkeypatch):
    found = planned("--config.data.max_length=256", "--config.train.batch_size=8")
    base = partition.nbytes(found.shapes["params"])
    state = 8 * partition.nbytes(found.shapes["lora"])
    one = group.activation_bytes(found)
    monkeypatch.setattr(group, "activation_bytes", lambda _: one)  # it traces the model
    assert sizes(found, base + 10 * state + int(2.5 * one / 0.6)) == (5, 2)
    assert sizes(found, base + 10 * state + int(4 * one / 0.6)) == (5, 3)  # 3 and 2, not 4 and 1
    assert sizes(found, base + 10 * state) == (5, 1)
    assert sizes(found, base + 6 * state)[0] == 3  # half of what is left: three members, so parts of 3 and 2
    assert sizes(found, 0) == (1, 1)  # it tries, and the device says that it is too much


def test_what_is_asked_for_is_taken(planned, monkeypatch):
    found = planned()
    monkeypatch.setattr(group, "activation_bytes", lambda _: 10**6)  # it traces the model
    assert sizes(found, 10**10, group_size=2) == (2, 2)
    assert sizes(found, 10**10, group_size=4) == (3, 3)  # parts of 3 and 2, not of 4 and 1
    assert sizes(found, 10**10, at_once=2) == (5, 2)
    assert sizes(found, 10**10, group_size=2, at_once=7) == (2, 2)


def test_over_devices_each_gets_as_many(planned):
    found = planned("--config.mesh.data=4", devices=4)
    assert found.mesh.shape["member"] == 4 and (found.size, found.at_once, found.count) == (5, 1, 8)
    assert sizes(found, 10**10) == (5, 2)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_the_estimate_is_near_what_the_compiler_says(planned, remat):
    found = planned(f"--config.remat={remat}", "--config.data.max_length=256", "--config.train.batch_size=8")
    trainable, frozen = partition.split(found.shapes, found.mask)
    whole = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    batch = Batch(*[whole] * 4, loss_mask=jax.ShapeDtypeStruct((8, 256), jnp.bool_))
    step = jax.jit(jax.value_and_grad(lambda trainable, frozen, batch: loss_sum(found.model, trainable, frozen, batch)))
    needed = step.lower(trainable, frozen, batch).compile().memory_analysis().temp_size_in_bytes
    assert 0.5 < group.activation_bytes(found) / needed < 2
