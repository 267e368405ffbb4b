"""Matrix products that multiply in the dtype of their operands and accumulate in float32, in the backward pass too.

Float32 accumulation is free on an accelerator, and on a CPU in bfloat16 it is 2x to 3x faster than the plain product.
Float32 products ask for full precision: whoever pays for float32 wants its digits.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lowrank.model.cpu import doubled_row, from_bits, to_bits, transposed_copy

SAVED = "saved"  # `checkpoint_name` of the activations that remat "dots" saves for the backward pass


def product(a: jax.Array, b: jax.Array, axes, batch=((), ())) -> jax.Array:
    """Contract `axes` (of a, of b) over the `batch` axes (of a, of b) -> float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (axes, batch), precision, preferred_element_type=jnp.float32)


@jax.custom_vjp
def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """[..., in] @ [in, out] -> float32 [..., out]. w is cast to the dtype of x.

    The gradients are products in that dtype too. JAX's own would multiply the float32 gradient with the kernel cast to
    float32: at half the speed or less, and with copies of all kernels in twice their size.
    """
    return _dot(x, w)


def _dot(x, w):
    return doubled_row(lambda x, w: product(x, w.astype(x.dtype), ((x.ndim - 1,), (0,))), x, w)


def _dot_forward(x, w):
    y = _dot(x.value, w.value)
    dtypes = jnp.zeros(0, x.value.dtype), jnp.zeros(0, w.value.dtype)
    return y, (x.value if w.perturbed else None, w.value if x.perturbed else None, dtypes)


def _dot_backward(residuals, g):
    x, w, (like_x, like_w) = residuals
    g = g.astype(like_x.dtype)  # exact: the caller casts the result to that dtype, so g was cast up from it
    d_x = None if w is None else product(g, w.astype(g.dtype), ((g.ndim - 1,), (1,))).astype(g.dtype)
    d_w = None if x is None else sum_of_outer(x, g).astype(like_w.dtype)  # float32 in training
    return d_x, d_w


dot.defvjp(_dot_forward, _dot_backward, symbolic_zeros=True)


def dot_tied(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [rows, D] @ table [V, D] transposed -> float32 [rows, V]: the logits of a tied head, in generation.

    Not `dot` of the transposed table, of which XLA's CPU backend makes a float32 copy (15M parameters, 8 rows: 26 ms
    instead of 4).
    """
    return doubled_row(lambda x, table: product(x, table.astype(x.dtype), ((1,), (1,))), x, table)


def sum_of_outer(x: jax.Array, g: jax.Array) -> jax.Array:
    """x [..., in], g [..., out] -> float32 [in, out], summed over all other axes: the gradient of a kernel."""
    x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    if x.shape[-1] <= g.shape[-1]:
        return product(transposed_copy(x), g, ((1,), (0,)))
    return jax.lax.optimization_barrier(product(transposed_copy(g), x, ((1,), (0,)))).T


def save_without_gradient(x: jax.Array) -> jax.Array:
    """As `save_for_backward`, where no gradient has to pass.

    x is saved as its bits: JAX would round saved floats once more, and stacking them takes 8 % of a step (135M parameters).
    """
    return from_bits(checkpoint_name(to_bits(x), SAVED), x.dtype)


save_for_backward = jax.custom_vjp(save_without_gradient)
"""x itself, which remat "dots" saves for the backward pass instead of computing it again."""
save_for_backward.defvjp(lambda x: (save_without_gradient(x), None), lambda _, g: (g,))


@jax.custom_vjp
def embedding_lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table [V, D], int32 ids [...] -> [..., D]; the table's gradient is accumulated in float32."""
    return from_bits(jnp.take(to_bits(table), ids, axis=0), table.dtype)


def _lookup_forward(table, ids):
    # An empty array carries the table's size and dtype to the backward pass.
    like_table = jnp.zeros((table.value.shape[0], 0), table.value.dtype)
    return embedding_lookup(table.value, ids.value), (ids.value, like_table)


def _lookup_backward(residuals, g):
    ids, like_table = residuals
    sums = jnp.zeros((like_table.shape[0], g.shape[-1]), jnp.float32).at[ids].add(g.astype(jnp.float32))
    return sums.astype(like_table.dtype), None


embedding_lookup.defvjp(_lookup_forward, _lookup_backward, symbolic_zeros=True)
