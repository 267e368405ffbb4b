"""Workarounds for XLA's CPU backend, which is slow with bfloat16 and narrow matrices; harmless on other backends."""

import jax
import jax.numpy as jnp


def doubled_row(multiply, x: jax.Array, w: jax.Array) -> jax.Array:
    """multiply(x, w). In bfloat16 on a CPU a single row is duplicated, as in generation: XLA's CPU backend upcasts the
    whole matrix for one row, which costs as much as a hundred rows, and does not for two."""
    if x.ndim == 1 or x.size > x.shape[-1] or x.dtype == jnp.float32:
        return multiply(x, w)
    on_cpu = lambda x, w: multiply(jnp.concatenate([x, x]), w)[:1]  # noqa: E731
    return jax.lax.platform_dependent(x, w, cpu=on_cpu, default=multiply)


def transposed_copy(x: jax.Array) -> jax.Array:
    """[..., m, n] -> [..., n, m], copied even where XLA would fuse the transpose into the product that follows.

    XLA's CPU backend takes up to 8x as long for a product that contracts the first axis of both matrices, if one of
    them is narrow. Copying the narrow one costs little.
    """
    return jax.lax.optimization_barrier(x.swapaxes(-1, -2))


def to_bits(x: jax.Array) -> jax.Array:
    """x bitcast to unsigned integers of the same size: XLA's CPU backend moves bfloat16 by way of float32."""
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def from_bits(integers: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of `to_bits`."""
    return jax.lax.bitcast_convert_type(integers, dtype)
