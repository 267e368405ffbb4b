"""Roofline and money: literal numbers that can be worked out on paper."""

import dataclasses

import pytest

from lowrank.adapters.config import LoraConfig
from lowrank.config import Config, DataConfig, TrainConfig
from lowrank.families.config import ModelConfig
from lowrank.families.sizes import SIZES
from lowrank.model.flops import step_flops
from lowrank.planning import roofline
from lowrank.planning.roofline import Roofline, Share
from lowrank.planning.workload import Workload, alpaca_epoch, list_workloads

# Every projection has 32 inputs or outputs, but k and v, with 16: 5 * 1024 + 2 * 512 = 6,144 elements of kernels in a layer.
TINY = ModelConfig(vocab=64, embed=32, mlp=32, layers=3, heads=4, kv_heads=2, head_dim=8)
CONFIG = Config(
    data=DataConfig(max_length=8),
    lora=LoraConfig(rank=2, targets=("q_proj",)),
    train=TrainConfig(steps=10, batch_size=16, microbatches=2),
    remat="full",
)


def test_the_largest_of_three_bounds_a_step():
    times = Roofline(compute=1.0, memory=3.0, interconnect=2.0)
    assert (times.seconds, times.bound) == (3.0, "memory")


def test_a_bill_is_of_whole_steps():
    found = Workload("a million", 1_000_000, fill=0.8).bill(slots=16_384, seconds=1.8, chips=8, price=1.20)
    assert found.steps == 77  # 1,250,000 slots are 76.3 steps
    assert found.hours == pytest.approx(77 * 1.8 / 3600)
    assert found.dollars == pytest.approx(77 * 1.8 / 3600 * 8 * 1.20)
    assert Workload("a million", 1e6, 1.0).bill(1000, 1.0, 8, None).dollars is None


def test_a_share_is_one_devices_part():
    share = Share(CONFIG, TINY, data=2, fsdp=2, tensor=2)
    assert (share.tokens, share.passes) == (16, 3)
    assert (share.kernels, share.factors) == (3 * 6_144, 384)
    assert roofline.flops(share) == step_flops(TINY, CONFIG.lora, 16, 8, "full").total / 8


def test_arguments_are_the_base_in_two_bytes_and_the_adapter_in_twelve():
    share = Share(CONFIG, TINY, data=2, fsdp=2, tensor=2)
    base, adapter = 3 * 6_144 + 2 * 64 * 32, 3 * (32 + 32) * 2
    assert roofline.arguments(share) == base * 2 / 4 + adapter * 12 / 2


def test_bytes_over_the_links():
    one = Share(CONFIG, TINY, data=1, fsdp=1, tensor=1)
    assert roofline.link_traffic(one) == 0
    data = one._replace(data=4)  # only the adapter's gradient is summed, in each micro-batch
    assert roofline.link_traffic(data) == 2 * 384 * 2 * 2 * 3 / 4
    fsdp = one._replace(fsdp=4)  # and everything is gathered in each pass
    gathered = (3 * 6_144 + 3 * 2_048) * 2
    assert roofline.link_traffic(fsdp) == 2 * (3 * gathered * 3 / 4 + 384 * 2 * 2 * 3 / 4)
    tensor = one._replace(tensor=2)  # six and five sums of activations in each layer, in units of two bytes
    assert roofline.link_traffic(tensor) == 2 * 11 * 3 * 64 * 32 * 2 * 2 * 1 / 2


def test_without_remat_there_is_a_pass_less_and_more_is_kept():
    full = Share(CONFIG, TINY, 1, 1, 1)
    none = full._replace(config=dataclasses.replace(CONFIG, remat="none"))
    assert roofline.memory_traffic(none) < roofline.memory_traffic(full)
    assert roofline.temporaries(none) > roofline.temporaries(full)


def test_an_epoch_of_alpaca_depends_on_the_tokenizer():
    llama2 = alpaca_epoch(CONFIG, SIZES["llama2-7b"])
    llama3 = alpaca_epoch(CONFIG, SIZES["llama3-8b"])
    assert (llama2.tokens, llama3.tokens) == (52_002 * 127.5, 52_002 * 103.2)
    assert [each.name for each in list_workloads(CONFIG, SIZES["llama3-8b"], 5e6)[2:]] == ["100M tokens", "5M tokens"]


@pytest.mark.parametrize(
    ("data", "share"),
    [
        (DataConfig(max_length=1000), 0.98),
        (DataConfig(max_length=1000, packing=False), 0.1275),
        (DataConfig(max_length=50, packing=False), 1.0),
    ],
)
def test_how_full_rows_are(data, share):
    assert alpaca_epoch(dataclasses.replace(CONFIG, data=data), SIZES["llama2-7b"]).fill == share


def test_a_bill_of_whole_steps_has_as_many():
    whole = Workload("whole steps", 2925 * 8192 * 0.79813, 0.79813)  # its float quotient is a rounding above
    assert whole.bill(8192, 1.0, 8, None).steps == 2925
