"""Operations by hand: against the traced step, to the last one, and a closed form everybody knows."""

import math

import jax
import jax.numpy as jnp
import pytest

from lowrank.adapters.config import LoraConfig
from lowrank.data.batch import Batch
from lowrank.families.config import ModelConfig
from lowrank.families.sizes import SIZES
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.model.flops import step_flops, visible_pairs
from lowrank.training import partition
from lowrank.training.optimizer import OptimConfig, learning_rate_schedule, make_optimizer
from lowrank.training.step import State, make_update

TINY = ModelConfig(vocab=96, embed=48, mlp=80, layers=3, heads=4, kv_heads=2, head_dim=16)
ALL, SOME = LoraConfig(rank=5), LoraConfig(rank=4, targets=("q_proj", "v_proj"))
UNEVEN = LoraConfig(rank=4, ranks=(("down_proj", (2, 6, 0)),))


def products(jaxpr) -> int:
    """2·m·k·n of every matrix product of a traced function; a scan's as often as it runs, a conditional's largest branch."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            continue
        inner = [
            products(getattr(value, "jaxpr", value))
            for param in equation.params.values()
            for value in (param if isinstance(param, (tuple, list)) else [param])
            if hasattr(getattr(value, "jaxpr", value), "eqns")
        ]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * (max(inner) if equation.primitive.name == "cond" else sum(inner))
    return total


@pytest.mark.parametrize(
    ("mode", "lora", "remat", "length"),
    [
        *[("lora", ALL, remat, 130) for remat in ("none", "dots", "full")],  # attention in causal pieces
        ("lora", SOME, "full", 8),  # and in one
        ("lora", UNEVEN, "full", 8),
        *[("full", None, remat, 8) for remat in ("none", "full")],
    ],
)
def test_by_hand_is_what_the_step_does(mode, lora, remat, length):
    model = Decoder(TINY, lora, jnp.bfloat16, jnp.bfloat16, remat)
    shapes, _ = decoder.abstract(model)
    mask = partition.trainable_mask(shapes, mode)
    trainable, frozen = partition.split(shapes, mask)
    schedule = learning_rate_schedule(OptimConfig(), 10)
    optimizer = make_optimizer(OptimConfig(), schedule, mask)
    state = jax.eval_shape(lambda t: State(jnp.int32(0), t, optimizer.init(t), jax.random.key(0)), trainable)
    dtypes = Batch(*["int32"] * 4, loss_mask="bool")
    batch = Batch(*(jax.ShapeDtypeStruct((4, length), dtype) for dtype in dtypes))
    step = make_update(model, optimizer, schedule, microbatches=2)
    traced = products(jax.make_jaxpr(step)(state, frozen, batch).jaxpr)
    assert step_flops(TINY, lora, 4, length, remat, mode).total == traced


def test_the_parts_of_a_step_of_llama_3_8b():
    flops = step_flops(SIZES["llama3-8b"], LoraConfig(rank=16), rows=1, length=1024, remat="full")
    shapes, _ = decoder.abstract(Decoder(SIZES["llama3-8b"]))
    kernels = partition.count(shapes) - 2 * 128256 * 4096 - 65 * 4096  # less embedding, head and norms
    assert flops.base_forward == flops.base_backward == 2 * kernels * 1024
    assert flops.adapter == 3 * 2 * 41_943_040 * 1024  # PEFT counts 41,943,040 parameters at rank 16 on all seven
    assert flops.head == 2 * 2 * 128256 * 4096 * 1024
    assert flops.model < flops.total


def test_pairs_of_the_causal_pieces_are_nine_sixteenths():
    assert visible_pairs(1024) == 1024 * 1024 * 9 // 16
    assert visible_pairs(15) == 225
    assert visible_pairs(130) == 64 * 64 + 64 * 128 + 2 * 130  # pieces of 64 at least
