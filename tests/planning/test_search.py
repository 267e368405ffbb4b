"""The order in which a search compiles, with a compiler that refuses every program; what a dtype costs."""

import dataclasses
import sys
import types

import pytest

from lowrank.config import Config, DataConfig, TrainConfig
from lowrank.families.sizes import SIZES
from lowrank.planning.chips import CHIPS
from lowrank.planning.plan import compile_candidates, rank_candidates, step_roofline
from lowrank.planning.roofline import Share
from lowrank.planning.topology import Slice


def test_the_last_try_of_a_search_is_the_candidate_that_needs_the_least(monkeypatch):
    tried = []

    def refuse(config, *_):
        tried.append(config)
        return types.SimpleNamespace(fits=False)

    monkeypatch.setattr(sys.modules["lowrank.planning.plan"], "make_plan", refuse)
    config = Config(data=DataConfig(max_length=1024), train=TrainConfig(steps=1, batch_size=32))
    model, slice = SIZES["llama3-8b"], Slice("v5e:2x2", CHIPS["v5e"], (2, 2), (None,) * 4)
    ranked = rank_candidates(config, model, slice)
    assert len(list(compile_candidates(ranked, model, slice, fits=1, most=3))) == 3
    assert tried[:2] == [candidate for _, candidate in ranked[:2]]
    needed = {candidate: size for size, candidate in ranked}
    assert needed[tried[2]] == min(needed.values()) < needed[tried[0]]
    assert tried[2].remat == "full"


def test_float32_costs_a_tpu_six_products():
    config = Config(data=DataConfig(max_length=1024), train=TrainConfig(steps=1, batch_size=32), dtype="bfloat16")
    slice = Slice("v5e:2x2", CHIPS["v5e"], (2, 2), (None,) * 4)
    half, full = (
        step_roofline(Share(dataclasses.replace(config, dtype=dtype), SIZES["llama3-8b"], 1, 4, 1), slice, 0.0)
        for dtype in ("bfloat16", "float32")
    )
    assert full.compute == pytest.approx(6 * half.compute)
