"""Matrix products in the dtype of what goes in, summed up in float32; their gradients too.

Asking for float32 sums costs nothing on an accelerator and is 2x to 3x faster than the plain product on a CPU in bfloat16.
A float32 product is asked for in full precision: somebody who pays for float32 wants its digits.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"  # name of what remat "dots" keeps for the backward pass


def product(a: jax.Array, b: jax.Array, axes, batch=((), ())) -> jax.Array:
    """Both summed over `axes` (those of a, those of b), `batch` axes side by side -> float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (axes, batch), precision, preferred_element_type=jnp.float32)


@jax.custom_vjp
def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """[..., in] @ [in, out] -> float32 [..., out], multiplied in the dtype of x; w may be held in another.

    Its gradients are products in that dtype too. Left to itself, JAX multiplies the float32 gradient with the kernel
    turned into float32: at half the speed or less, and with copies of all kernels in twice their size.
    """
    return _dot(x, w)


def _dot(x, w):
    return product(x, w.astype(x.dtype), ((x.ndim - 1,), (0,)))


def _dot_forward(x, w):
    y = _dot(x.value, w.value)
    dtypes = jnp.zeros(0, x.value.dtype), jnp.zeros(0, w.value.dtype)
    return y, (x.value if w.perturbed else None, w.value if x.perturbed else None, dtypes)


def _dot_backward(needed, g):
    x, w, (like_x, like_w) = needed
    g = g.astype(like_x.dtype)  # loses nothing where the result was rounded to that dtype
    d_x = None if w is None else product(g, w.astype(g.dtype), ((g.ndim - 1,), (1,))).astype(g.dtype)
    d_w = None if x is None else sum_of_outer(x, g).astype(like_w.dtype)  # which is float32 in training
    return d_x, d_w


dot.defvjp(_dot_forward, _dot_backward, symbolic_zeros=True)


def sum_of_outer(x: jax.Array, g: jax.Array) -> jax.Array:
    """x [..., in], g [..., out] -> float32 [in, out], summed over all other axes."""
    x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    if x.shape[-1] <= g.shape[-1]:
        return product(turned(x), g, ((1,), (0,)))
    return jax.lax.optimization_barrier(product(turned(g), x, ((1,), (0,)))).T


def turned(x: jax.Array) -> jax.Array:
    """Matrices [..., m, n] -> [..., n, m], as a copy even if XLA finds that superfluous.

    Its CPU takes up to 8x as long for a product of two matrices that are both summed over their first axes, if one of
    them is narrow. A copy of the narrow one costs little.
    """
    return jax.lax.optimization_barrier(x.swapaxes(-1, -2))


def kept_bits(x: jax.Array) -> jax.Array:
    """x itself, which remat "dots" keeps for the backward pass; to be used where no gradient has to pass.

    It is kept as integers of its bits: JAX rounds the floating-point numbers that it keeps once more, and XLA's CPU stacks
    bfloat16 by way of float32, element by element, where it copies integers (135M parameters: 8 % of a step).
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, KEPT), x.dtype)


kept = jax.custom_vjp(kept_bits)
"""As `kept_bits`, and the gradient passes."""
kept.defvjp(lambda x: (kept_bits(x), None), lambda _, g: (g,))
