"""How fast a run is: tokens per second, model FLOPs utilisation (MFU), and the share of time that the devices waited."""

import contextlib
import time
import timeit
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lowrank.adapters.config import LoraConfig
from lowrank.config import Config
from lowrank.families.config import ModelConfig
from lowrank.model.flops import step_flops
from lowrank.parallel import distributed


class Speed:
    """Counts between two lines of the log, without the time spent in `paused` (evaluation, saving).

    A step is dispatched while the step before still runs. So a device waited only if the last step was done when the next
    one was ready to be dispatched; then at most since the device was last known to be at work.
    """

    def __init__(self, needed_flops: Callable[[int], float], ceiling: float | None):
        """`needed_flops`: trained tokens of a step -> its FLOPs. `ceiling`: the best FLOP/s of all devices, None if unknown."""
        self.needed_flops, self.ceiling = needed_flops, ceiling
        self.start()

    def start(self):
        """Count from now."""
        self.began = self.at_work = time.monotonic()
        self.tokens, self.flops, self.waited = 0, 0.0, 0.0

    def dispatches(self, idle: bool):
        """The next step is about to be dispatched; `idle`: the last step is done."""
        now = time.monotonic()
        self.waited += now - self.at_work if idle else 0.0
        self.at_work = now

    def read(self, tokens: int, trained: int):
        """A step's results have arrived, so the next step is at work."""
        self.tokens, self.flops = self.tokens + tokens, self.flops + self.needed_flops(trained)
        self.at_work = time.monotonic()

    @contextlib.contextmanager
    def paused(self):
        began = time.monotonic()
        yield
        self.at_work = time.monotonic()
        self.began += self.at_work - began

    def rates(self) -> dict[str, float]:
        """-> train/tokens_per_second, train/mfu (share of the ceiling) and train/waiting (share of the time); restarts."""
        at_work, seconds = self.at_work, max(time.monotonic() - self.began, 1e-9)
        found = {"train/tokens_per_second": self.tokens / seconds}
        if self.ceiling:
            found["train/mfu"] = self.flops / seconds / self.ceiling
        found["train/waiting"] = self.waited / seconds
        self.start()
        self.at_work = at_work
        return found


def make_speed(
    mesh: Mesh, dtype: jnp.dtype, config: Config, models: list[tuple[ModelConfig, LoraConfig | None]]
) -> Speed:
    """The speed of training these models (the members of a wave, or one) side by side; MFU where a ceiling is known."""
    rows, length = config.train.batch_size, config.data.max_length
    flops = [step_flops(model, lora, rows, length, config.remat, config.train.mode) for model, lora in models]
    device = jax.local_devices()[0]
    # Several CPU devices share the machine's cores, so what one of them reaches alone says nothing about all.
    known = config.log.every and distributed.is_first() and (device.platform != "cpu" or mesh.devices.size == 1)
    ceiling = mesh.devices.size * product_flops(device, dtype) if known else None
    return Speed(lambda trained: sum(each.needed(trained / (rows * length)) for each in flops), ceiling)


def product_flops(device: jax.Device, dtype: jnp.dtype) -> float:
    """FLOP/s of one large matrix product as the model asks for it, the best of 5: an upper bound for a step."""
    size = 1024 if device.platform == "cpu" else 8192
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None  # as in model/products.py
    multiply = jax.jit(
        lambda x: jnp.matmul(x, x, precision=precision, preferred_element_type=jnp.float32).astype(dtype)
    )
    return 2 * size**3 / best_seconds(multiply, x)


def best_seconds(function: Callable, x: jax.Array) -> float:
    """Seconds of the fastest of 5 calls, after one that compiles."""
    jax.block_until_ready(function(x))
    return min(timeit.repeat(lambda: jax.block_until_ready(function(x)), number=1, repeat=5))
