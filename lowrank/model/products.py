"""Matrix products in the dtype of what goes in, summed up in float32; their gradients too.

Asking for float32 sums costs nothing on an accelerator and is 2x to 3x faster than the plain product on a CPU in bfloat16.
A float32 product is asked for in full precision: somebody who pays for float32 wants its digits.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lowrank.model.cpu import bits, doubled_row, of_bits, transposed_copy

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
    return doubled_row(lambda x, w: product(x, w.astype(x.dtype), ((x.ndim - 1,), (0,))), x, w)


def _dot_forward(x, w):
    y = _dot(x.value, w.value)
    dtypes = jnp.zeros(0, x.value.dtype), jnp.zeros(0, w.value.dtype)
    return y, (x.value if w.perturbed else None, w.value if x.perturbed else None, dtypes)


def _dot_backward(needed, g):
    x, w, (like_x, like_w) = needed
    g = g.astype(like_x.dtype)  # as it came from there, where the result was rounded to that dtype
    d_x = None if w is None else product(g, w.astype(g.dtype), ((g.ndim - 1,), (1,))).astype(g.dtype)
    d_w = None if x is None else sum_of_outer(x, g).astype(like_w.dtype)  # which is float32 in training
    return d_x, d_w


dot.defvjp(_dot_forward, _dot_backward, symbolic_zeros=True)


def dot_tied(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [rows, D] times table [V, D] transposed -> float32 [rows, V]: the head that is the embedding, in generation.

    Not `dot` of a transposed table, of which XLA's CPU makes a float32 copy (15M shape, 8 rows: 26 ms instead of 4).
    """
    return doubled_row(lambda x, table: product(x, table.astype(x.dtype), ((1,), (1,))), x, table)


def sum_of_outer(x: jax.Array, g: jax.Array) -> jax.Array:
    """x [..., in], g [..., out] -> float32 [in, out], summed over all other axes."""
    x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    if x.shape[-1] <= g.shape[-1]:
        return product(transposed_copy(x), g, ((1,), (0,)))
    return jax.lax.optimization_barrier(product(transposed_copy(g), x, ((1,), (0,)))).T


def kept_bits(x: jax.Array) -> jax.Array:
    """x itself, which remat "dots" keeps for the backward pass; to be used where no gradient has to pass.

    Kept as numbers, JAX would round them once more, and stacking them takes 8 % of a step (135M parameters).
    """
    return of_bits(checkpoint_name(bits(x), KEPT), x.dtype)


kept = jax.custom_vjp(kept_bits)
"""As `kept_bits`, and the gradient passes."""
kept.defvjp(lambda x: (kept_bits(x), None), lambda _, g: (g,))


@jax.custom_vjp
def rows_of(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table [V, D], int32 ids [...] -> [..., D]; the table's gradient is summed in float32."""
    return of_bits(jnp.take(bits(table), ids, axis=0), table.dtype)


def _rows_forward(table, ids):
    # An empty array carries the table's size and dtype to the backward pass.
    like_table = jnp.zeros((table.value.shape[0], 0), table.value.dtype)
    return rows_of(table.value, ids.value), (ids.value, like_table)


def _rows_backward(needed, g):
    ids, like_table = needed
    sums = jnp.zeros((like_table.shape[0], g.shape[-1]), jnp.float32).at[ids].add(g.astype(jnp.float32))
    return sums.astype(like_table.dtype), None


rows_of.defvjp(_rows_forward, _rows_backward, symbolic_zeros=True)
