"""Products, rows and what is kept, beside plain NumPy: values, and the gradients of whichever arguments are asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.model.products import SAVED, dot, dot_tied, embedding_lookup, save_for_backward

F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def drawn(seed: int, shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(found, expected, dtype):
    """Sums of about 40 numbers of 1, in float32; or of what bfloat16 has left of them."""
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 if dtype == F32 else 0.02 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("held", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(40,), (1, 40), (1, 1, 40), (3, 5, 40)], ids=str)
@pytest.mark.parametrize("outputs", [3, 70])  # narrower and wider than the inputs
def test_dot_and_its_gradients(shape, outputs, held, dtype):
    x, w = drawn(0, shape, dtype), drawn(1, (40, outputs), held)
    by = drawn(2, (*shape[:-1], outputs), F32)

    @jax.jit
    def run(x, w):
        loss = lambda x, w: jnp.sum(dot(x, w) * by)  # noqa: E731
        return dot(x, w), [jax.grad(loss, wanted)(x, w) for wanted in ((0,), (1,), (0, 1))]

    y, (of_x, of_w, of_both) = run(x, w)
    rows, columns = np.asarray(x, np.float32), np.asarray(w.astype(dtype), np.float32)
    assert y.dtype == F32
    close(y, rows @ columns, F32)
    d_w = rows.reshape(-1, 40).T @ np.asarray(by).reshape(-1, outputs)
    expected = {"x": (x, np.asarray(by) @ columns.T), "w": (w, d_w)}
    for name, found in (("x", of_x[0]), ("w", of_w[0]), ("x", of_both[0]), ("w", of_both[1])):
        like, gradient = expected[name]
        assert found.dtype == like.dtype and found.shape == gradient.shape
        close(found, gradient, F32 if dtype == held == F32 else BF16)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_dot_over_members(dtype):
    x, w = drawn(0, (3, 4, 1, 40), dtype), drawn(1, (3, 40, 7), F32)
    loss = lambda dot: lambda x, w: jnp.sum(jnp.square(dot(x, w)))  # noqa: E731
    plain = lambda x, w: jnp.matmul(x.astype(F32), w.astype(dtype).astype(F32), precision="highest")  # noqa: E731
    found, expected = (jax.jit(jax.vmap(jax.grad(loss(f), (0, 1))))(x, w) for f in (dot, plain))
    for one, other in zip(found, expected, strict=True):
        close(one, other, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_a_tied_heads_logits_do_not_depend_on_the_rows_beside_them(rows, dtype):
    x, table = drawn(0, (33, 40), dtype)[:rows], drawn(1, (90, 40), dtype)
    found = jax.jit(dot_tied)(x, table)
    close(found, np.asarray(x, np.float32) @ np.asarray(table, np.float32).T, F32)
    if dtype == BF16:
        alone = jax.jit(dot_tied)(x[:1], table)
        np.testing.assert_array_equal(found[:1], alone)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rows_and_their_gradient(dtype):
    table, ids = drawn(0, (10, 4), dtype), jnp.asarray([[3, 3, 0], [9, 3, 1]])
    by = drawn(1, (2, 3, 4), dtype)
    np.testing.assert_array_equal(jax.jit(embedding_lookup)(table, ids), table[ids])
    found = jax.jit(jax.grad(lambda table: jnp.sum((embedding_lookup(table, ids) * by).astype(F32))))(table)
    expected = np.zeros((10, 4), np.float32)
    np.add.at(expected, np.asarray(ids), np.asarray(by, np.float32))
    assert found.dtype == dtype
    close(found, expected, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_what_is_kept_is_the_number_itself_and_is_not_computed_again(dtype):
    x = jnp.asarray([0.0, -0.0, 1.5, -2e-30, np.inf, np.nan], dtype)
    np.testing.assert_array_equal(
        np.asarray(jax.jit(save_for_backward)(x)).view(np.uint8), np.asarray(x).view(np.uint8)
    )
    policy = jax.checkpoint_policies.save_only_these_names(SAVED)

    def sines(keep):
        return str(
            jax.make_jaxpr(jax.grad(jax.checkpoint(lambda x: jnp.cos(keep(jnp.sin(x))).sum(), policy=policy)))(x[2])
        )

    assert sines(lambda x: x).count(" sin ") - sines(save_for_backward).count(" sin ") == 1
