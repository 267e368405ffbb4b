"""The counts of `training/speed.py`, on a clock that the test turns; and programs that are compiled again."""

import jax
import jax.numpy as jnp
import pytest

from lowrank.parallel.compiling import compile_once
from lowrank.runs import speed as speed_lib
from lowrank.runs.speed import Speed


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(speed_lib, "time", made)
    return made


def test_rates_leave_out_pauses_and_count_what_devices_waited(clock):
    speed = Speed(lambda trained: 10.0 * trained, ceiling=1000.0)
    clock.now += 1  # the first batch is made, nothing else runs
    speed.dispatches(idle=True)
    clock.now += 2
    speed.dispatches(idle=False)  # the first step is still at work
    clock.now += 2
    speed.read(tokens=40, trained=30)
    with speed.paused():
        clock.now += 500
    clock.now += 1
    speed.dispatches(idle=True)  # at most since the pause
    clock.now += 4
    speed.read(tokens=60, trained=50)
    assert speed.rates() == pytest.approx(
        {"train/tokens_per_second": 100 / 10, "train/mfu": 800 / 10 / 1000, "train/waiting": 2 / 10}
    )
    clock.now += 4
    speed.dispatches(idle=True)  # since the last results were read, on the new count
    speed.read(tokens=8, trained=0)
    assert speed.rates() == pytest.approx({"train/tokens_per_second": 2, "train/mfu": 0, "train/waiting": 1})


def test_without_a_ceiling_there_is_no_mfu(clock):
    speed = Speed(lambda trained: 1.0, ceiling=None)
    clock.now += 1
    assert speed.rates().keys() == {"train/tokens_per_second", "train/waiting"}


def test_a_program_is_compiled_once_and_for_other_arguments_again_with_a_warning():
    compiled = []

    @jax.jit
    def twice(x):
        compiled.append(x.shape)
        return 2 * x

    waited = []
    program = compile_once(twice, lambda: waited.append(len(compiled)))
    assert program(jnp.ones(3)).tolist() == [2, 2, 2]
    assert program(jnp.zeros(3)).tolist() == [0, 0, 0]
    assert compiled == [(3,)] and waited == [1]
    with pytest.warns(UserWarning, match=r"twice is compiled again: .*float32\[3\].*float32\[2\]"):
        assert program(jnp.ones(2)).tolist() == [2, 2]
    assert compiled == [(3,), (2,)] and waited == [1, 2]


def test_a_mistake_is_no_reason_to_compile_again(recwarn):
    program = compile_once(jax.jit(lambda x: 2 * x, donate_argnums=0))
    x = jnp.ones(3)
    program(x)
    x.delete()
    with pytest.raises((ValueError, RuntimeError), match="deleted"):
        program(x)
    assert not [warning for warning in recwarn if "compiled again" in str(warning.message)]
