"""The order in which a search compiles, with a compiler that always says no; what a dtype costs."""

import dataclasses
import types

import pytest

from lowrank.config import Config, DataConfig, TrainConfig
from lowrank.families.sizes import SIZES
from lowrank.planning import plan as planning
from lowrank.planning.chips import CHIPS
from lowrank.planning.roofline import Share
from lowrank.planning.topology import Slice


def test_the_last_try_of_a_search_is_the_candidate_that_needs_the_least(monkeypatch):
    tried = []

    def refuse(config, *_):
        tried.append(config)
        return types.SimpleNamespace(fits=False)

    monkeypatch.setattr(planning, "make_plan", refuse)
    config = Config(data=DataConfig(max_length=1024), train=TrainConfig(steps=1, batch_size=32))
    wanted = (config, SIZES["llama3-8b"], Slice(CHIPS["v5e"], "2x2", (None,) * 4))
    assert len(list(planning.search(*wanted, steps=1, wanted=1, most=3))) == 3
    ranked = planning.candidates(*wanted)
    assert tried[:2] == [one for _, one in ranked[:2]]
    needed = {one: size for size, one in ranked}
    assert needed[tried[2]] == min(needed.values()) < needed[tried[0]]
    assert tried[2].remat == "full"


def test_float32_costs_a_tpu_six_products():
    config = Config(data=DataConfig(max_length=1024), train=TrainConfig(steps=1, batch_size=32), dtype="bfloat16")
    slice = Slice(CHIPS["v5e"], "2x2", (None,) * 4)
    half, full = (
        planning.roofline(Share(dataclasses.replace(config, dtype=dtype), SIZES["llama3-8b"], 1, 4, 1), slice, 0.0)
        for dtype in ("bfloat16", "float32")
    )
    assert full.compute == pytest.approx(6 * half.compute)
