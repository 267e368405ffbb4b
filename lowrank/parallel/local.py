"""This machine's own devices as a slice like any other: how fast one is, measured in a second or two."""

import contextlib
import time
import typing

import jax
import jax.numpy as jnp

from lowrank.parallel import memory
from lowrank.parallel import mesh as mesh_lib
from lowrank.parallel.chips import Chip
from lowrank.parallel.topology import Slice

SIZES = {"cpu": 1024}  # of the matrices whose product is timed; elsewhere ELSE
ELSE = 8192
COPIED = 2**26  # float32 numbers


class Local(Slice):
    """Its links are taken to be as fast as its memory, which is what several CPU devices share."""

    @property
    def name(self) -> str:
        return self.chip.name

    @property
    def bandwidth(self) -> float:
        return self.chip.link

    def compiling(self) -> typing.ContextManager:
        return contextlib.nullcontext()

    def group_bandwidth(self, devices: typing.Sequence[jax.Device]) -> float:
        return self.chip.link


def open_local(dtype: jnp.dtype) -> Local:
    """All local devices."""
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig())
    devices = list(mesh.devices.flat)
    long = jax.device_put(jnp.ones(COPIED, jnp.float32), devices[0])
    copy = jax.jit(lambda x: x + 1)
    bandwidth = 2 * long.nbytes / _seconds(copy, long)
    free = memory.free_bytes(mesh)
    chip = Chip("local", product_flops(devices[0], dtype), free, bandwidth, bandwidth, (str(len(devices)),))
    return Local(chip, str(len(devices)), devices)


def product_flops(device: jax.Device, dtype: jnp.dtype) -> float:
    """FLOP/s of one large matrix product as the model asks for it, the best of 5: what a step cannot be faster than."""
    size = SIZES.get(device.platform, ELSE)
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None  # as `product` in model/products.py
    multiply = jax.jit(
        lambda x: jnp.matmul(x, x, precision=precision, preferred_element_type=jnp.float32).astype(dtype)
    )
    return 2 * size**3 / _seconds(multiply, x)


def _seconds(function, x) -> float:
    jax.block_until_ready(function(x))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(function(x))
        best = min(best, time.perf_counter() - began)
    return best
