"""TODO model.cpu"""

import jax
import jax.numpy as jnp


def doubled_row(multiply, x, w):
    """multiply(x, w); where x is one row, as in generation, on a CPU in bfloat16: of that row twice. XLA's CPU turns the
    matrix into float32 for one row, which takes as long as a hundred rows; for two it does not."""
    if x.ndim == 1 or x.size > x.shape[-1] or x.dtype == jnp.float32:
        return multiply(x, w)
    twice = lambda x, w: multiply(jnp.concatenate([x, x]), w)[:1]  # noqa: E731
    return jax.lax.platform_dependent(x, w, cpu=twice, default=multiply)


def transposed_copy(x: jax.Array) -> jax.Array:
    """Matrices [..., m, n] -> [..., n, m], as a copy even if XLA finds that superfluous.

    Its CPU takes up to 8x as long for a product of two matrices that are both summed over their first axes, if one of
    them is narrow. A copy of the narrow one costs little.
    """
    return jax.lax.optimization_barrier(x.swapaxes(-1, -2))


def bits(x: jax.Array) -> jax.Array:
    """The bits of x, as unsigned integers of the same size."""
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def of_bits(integers: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse."""
    return jax.lax.bitcast_convert_type(integers, dtype)
