"""The order in which a search compiles, with a compiler that always says no."""

import types

from lowrank import planning
from lowrank.config import Config, DataConfig, TrainConfig
from lowrank.model.architecture import SIZES
from lowrank.parallel.chips import CHIPS
from lowrank.parallel.topology import Slice


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
