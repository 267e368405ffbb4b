"""Every backend beside `jax.nn.dot_product_attention`: results, gradients, windows; and that no segment sees another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.model import kernels
from lowrank.model.kernels import (
    AUTO,
    INTERPRETED,
    AttentionMask,
    attend,
    causal_mask,
    choose_backend,
    compare_with_xla,
    supports_length,
    verify_backend,
    window_mask,
)

ON_GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
BACKENDS = ["xla", INTERPRETED, pytest.param("cudnn", marks=ON_GPU)]
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def of_lengths(*lengths: int):
    """xla with rows of each of the lengths, the kernels with rows of 256."""
    kernels = [(INTERPRETED, 256), pytest.param("cudnn", 256, marks=ON_GPU)]
    return [*[("xla", length) for length in lengths], *kernels]


def drawn(rows: int, length: int, dtype):
    """q, k, v, and what the gradients are by."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(rows, *shape, HEAD_DIM)), dtype)  # noqa: E731
    return draw(length, HEADS) / 4, draw(KV_HEADS, length), draw(KV_HEADS, length), draw(length, HEADS)


def packed(segments) -> AttentionMask:
    segments = jnp.asarray(segments, jnp.int32)
    return AttentionMask(segments, causal_mask(jnp.arange(segments.shape[1]), segments, segments))


def with_gradients(attention):
    """attention(q, k, v, window) -> a jitted function of these and of what the gradients are by; one program for every
    window that is not None."""

    @jax.jit
    def results(q, k, v, by, window=None):
        y, transposed = jax.vjp(lambda q, k, v: attention(q, k, v, window), q, k, v)
        return [x.astype(jnp.float32) for x in (y, *transposed(by))]

    return results


def textbook(mask):
    def attention(q, k, v, window):
        seen = mask if window is None else mask & window_mask(jnp.arange(q.shape[1]), q.shape[1], window)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=1.0)

    return with_gradients(attention)


def dtype_of(backend):
    return jnp.bfloat16 if backend == "cudnn" else jnp.float32


@pytest.mark.parametrize(("backend", "length"), of_lengths(5, 130, 600))  # xla: one, two and more kinds of pieces
def test_results_and_gradients_equal_those_of_jax_nn(backend, length):
    q, k, v, by = drawn(2, length, dtype_of(backend))
    mask = packed(np.random.default_rng(1).integers(1, 3, (2, length)).cumsum(axis=1) // 20)
    found = with_gradients(lambda q, k, v, _: attend(backend, q, k, v, mask))(q, k, v, by)
    expected = textbook(mask.full)(*(x.astype(jnp.float32) for x in (q, k, v, by)))
    atol = 2e-5 if q.dtype == jnp.float32 else 3e-2  # values of about 1
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layers_window_is_chosen_among_those_of_the_model(backend):
    q, k, v, by = drawn(1, 256, dtype_of(backend))
    mask = packed(np.full((1, 256), 1))
    attention = with_gradients(lambda q, k, v, window: attend(backend, q, k, v, mask, 0, window, (0, 3, 100, 3)))
    plain = textbook(mask.full)
    for window in (0, 3, 100):
        found = attention(q, k, v, by, jnp.int32(window))
        expected = plain(
            *(x.astype(jnp.float32) for x in (q, k, v, by)), jnp.int32(window or 256)
        )  # 256: the whole row
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 if q.dtype == jnp.float32 else 3e-2)


@pytest.mark.parametrize(("backend", "length"), of_lengths(12, 256))
def test_what_changes_in_one_segment_changes_nothing_in_the_others(backend, length):
    q, k, v, by = drawn(1, length, dtype_of(backend))
    first, last = length // 4, length // 2  # of the middle segment
    place = np.arange(length)
    mask = packed(np.select([place < first, place < last, place < length - 2], [1, 2, 3], 0)[None])
    run = with_gradients(lambda q, k, v, _: attend(backend, q, k, v, mask))
    before = run(q, k, v, by)
    changed = [
        x.at[(slice(None),) * axis + (slice(first, last),)].add(3)
        for x, axis in zip((q, k, v, by), (1, 2, 2, 1), strict=True)
    ]
    for a, b, axis in zip(map(np.asarray, run(*changed)), map(np.asarray, before), (1, 1, 2, 2), strict=True):
        moved = (a != b).any(axis=tuple({0, 1, 2, 3} - {axis}))
        middle = (first <= place) & (place < last)
        assert moved[middle].any() and not moved[~middle].any()


def test_a_backend_is_tried_before_it_is_trusted(monkeypatch):
    config = ModelConfig(vocab=8, embed=8, mlp=8, layers=1, heads=4, kv_heads=2, head_dim=16, windows=(8,))
    shape = (jnp.bfloat16, config)
    assert compare_with_xla(INTERPRETED, *shape) is None
    assert compare_with_xla("xla", *shape) is None
    right = kernels.attend

    def leaks(backend, q, k, v, mask, *rest):
        everything = AttentionMask(
            jnp.ones_like(mask.segment_ids), causal_mask(jnp.arange(q.shape[1]), *[jnp.ones_like(mask.segment_ids)] * 2)
        )
        return right("xla", q, k, v, everything if backend == "leaks" else mask, *rest)

    def faint(backend, q, k, v, mask, *rest):
        y = right("xla", q, k, v, mask, *rest)
        return y + 1e-3 * jnp.mean(v, (1, 2))[:, None, None] if backend == "faint" else y

    monkeypatch.setattr(kernels, "attend", leaks)
    assert "away from those of 'xla'" in compare_with_xla("leaks", *shape)
    monkeypatch.setattr(kernels, "attend", faint)
    assert "see each other" in compare_with_xla("faint", *shape)


def test_the_backend_is_chosen_by_device_and_rows():
    bf16, f32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert choose_backend(AUTO, "cpu", bf16, 64, 256) == choose_backend("xla", "tpu", bf16, 64, 256) == "xla"
    assert choose_backend(AUTO, "tpu", bf16, 64, 256) == "splash"
    assert choose_backend(AUTO, "tpu", bf16, 64, 200) == choose_backend(AUTO, "gpu", f32, 64, 256) == "xla"
    assert choose_backend(AUTO, "gpu", bf16, 64, 200) == "cudnn"
    assert choose_backend("splash", "cpu", bf16, 64, 256) == INTERPRETED
    assert (
        supports_length("cudnn", 200)
        and not supports_length("cudnn", 201)
        and not supports_length("splash", 200)
        and supports_length("xla", 201)
    )
    for wanted, platform, dtype, head_dim, length, why in (
        ("splash", "tpu", bf16, 64, 200, "config.data.max_length is 200"),
        ("splash", "gpu", bf16, 64, 256, "is for TPUs"),
        ("cudnn", "cpu", bf16, 64, 256, "is for NVIDIA GPUs"),
        ("cudnn", "gpu", f32, 64, 256, "config.dtype is float32"),
        ("cudnn", "gpu", bf16, 160, 256, "heads of a multiple of 8 up to 128"),
    ):
        with pytest.raises(UserError, match=why):
            choose_backend(wanted, platform, dtype, head_dim, length)


def test_a_backend_that_is_wrong_here_is_not_used(monkeypatch):
    c = ModelConfig(vocab=8, embed=8, mlp=8, layers=1, heads=2, kv_heads=1, head_dim=8)
    assert verify_backend("xla", "xla", jnp.dtype("float32"), c) == "xla"
    monkeypatch.setattr(kernels, "compare_with_xla", lambda *_: "it is wrong")
    with pytest.warns(UserWarning, match="attention is computed by 'xla', not by 'cudnn': it is wrong"):
        assert verify_backend("cudnn", AUTO, jnp.dtype("bfloat16"), c) == "xla"
    with pytest.raises(
        UserError, match=r"config.attention='cudnn' cannot be used here: it is wrong; leave it at 'auto'"
    ):
        verify_backend("cudnn", "cudnn", jnp.dtype("bfloat16"), c)


def test_a_backend_that_fails_here_is_not_used(monkeypatch):
    def fails(*_):
        raise RuntimeError("no such library\nhere")

    c = ModelConfig(vocab=8, embed=8, mlp=8, layers=1, heads=2, kv_heads=1, head_dim=8)
    monkeypatch.setattr(kernels, "attend", fails)
    with pytest.warns(UserWarning, match="computed by 'xla', not by 'splash': RuntimeError: no such library here"):
        assert verify_backend("splash", AUTO, jnp.dtype("bfloat16"), c) == "xla"
