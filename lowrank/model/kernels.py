"""Attention masks, and three backends that compute attention under them: `xla` everywhere, `splash` on a TPU, `cudnn` on
a GPU. All have grouped queries, packed rows and windows, forward and backward.

Queries come scaled by 1/sqrt(H): where they are rotated, in float32, that is free, and no backend's own scaling matters.
Scores and softmax are in float32. `splash` and `cudnn` take rows that attend to themselves; with a cache, or for a row
length that they do not support, `xla` computes.
"""

import functools
import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.model.cpu import transposed_copy
from lowrank.model.products import SAVED, product, save_without_gradient
from lowrank.parallel import mesh as mesh_lib

MAX_BLOCKS = 8  # causal blocks that a row's queries are split into
MIN_BLOCK = 64  # queries of a causal block
LANES = 128  # splash needs rows of a multiple of this length
SPLASH_BLOCK = 512  # queries, and keys, of a splash block at most


class AttentionMask(NamedTuple):
    """A query attends to a key of the same segment in a slot that is not later and, in a layer with a window, not too
    far back. Every backend but splash needs `full`, which has all of it but the window."""

    segment_ids: jax.Array  # int32 [B, T], of the queries
    full: jax.Array | None  # bool [B, T, S]


def causal_mask(query_slots: jax.Array, query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """Slots [T], segment ids [B, T] and [B, S] -> bool [B, T, S]: the key is not later and of the same segment."""
    causal = query_slots[:, None] >= jnp.arange(key_segments.shape[1])[None, :]
    return causal & (query_segments[:, :, None] == key_segments[:, None, :])


def window_mask(query_slots: jax.Array, key_slots: int, window: jax.Array) -> jax.Array:
    """Slots [T], number of key slots S -> bool [T, S]: the key is less than `window` slots back. 0 is no window."""
    distance = query_slots[:, None] - jnp.arange(key_slots)[None, :]
    return (distance < window) | (window == 0)


def attend(
    backend: str,
    q: jax.Array,  # [B, T, N, H], scaled
    k: jax.Array,  # [B, K, S, H]
    v: jax.Array,  # [B, K, S, H]
    mask: AttentionMask,
    slot: jax.Array | int = 0,  # of the first query
    window: jax.Array | None = None,  # int32, this layer's: one of `windows`, 0 for none; None if no layer has one
    windows: tuple[int, ...] = (),
) -> jax.Array:
    """-> [B, T, N, H]. `backend` as `choose_backend` returns it."""
    if backend.startswith("splash"):
        return splash(q, k, v, mask.segment_ids, window, windows, interpret=backend == INTERPRETED)
    full = mask.full
    if window is not None:
        full = full & window_mask(slot + jnp.arange(q.shape[1]), k.shape[2], window)
    return cudnn(q, k, v, full) if backend == "cudnn" else xla(q, k, v, full)


@jax.custom_vjp
def xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B, T, N, H], k and v [B, K, S, H], mask bool [B, T, S] -> [B, T, N, H].

    Where a row attends to itself, the queries are split into causal blocks, each of which reads only the keys up to its
    own end: half the arithmetic, a fraction of the memory. The backward pass computes the scores again, and is written
    out (FlashAttention's, Dao et al., 2022, https://arxiv.org/abs/2205.14135) because it needs no second softmax.
    """
    return _xla(q, k, v, mask)[0]


def _xla(q, k, v, mask):
    """-> the result; each query's largest score and sum of weights, float32 [B, K, G, T, 1]."""
    queries = _by_query_group(q, k.shape[1])
    results, maxima, sums = [], [], []
    for start, end, keys in causal_blocks(q.shape[1], k.shape[2]):
        scores = _scores(queries[..., start:end, :], k[:, :, :keys], mask[:, start:end, :keys])
        maxima.append(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - maxima[-1])
        sums.append(jnp.sum(weights, axis=-1, keepdims=True))
        # The softmax's division comes after the product with the values: H columns to divide instead of S.
        results.append(_batched(weights.astype(q.dtype), v[:, :, :keys], 1) / sums[-1])
    y, maximum, total = (jnp.concatenate(blocks, axis=3) for blocks in (results, maxima, sums))
    return _by_token(y.astype(q.dtype)), maximum, total


def _xla_forward(q, k, v, mask):
    y, maximum, total = (save_without_gradient(x) for x in _xla(q, k, v, mask))
    return y, (q, k, v, mask, y, maximum, total)


def _xla_backward(residuals, g):
    q, k, v, mask, y, maximum, total = residuals
    queries = _by_query_group(q, k.shape[1])
    g, y = (_by_query_group(x, k.shape[1]).astype(jnp.float32) for x in (g, y))
    common = jnp.sum(g * y, axis=-1, keepdims=True) / total  # what a softmax subtracts from the gradients of its scores
    g = (g / total).astype(q.dtype)
    d_q, d_k = [], jnp.zeros(k.swapaxes(2, 3).shape, jnp.float32)  # [B, K, H, S]
    d_v = d_k
    for start, end, keys in causal_blocks(q.shape[1], k.shape[2]):
        at, block_keys = (..., slice(start, end), slice(None)), k[:, :, :keys]
        weights = jnp.exp(_scores(queries[at], block_keys, mask[:, start:end, :keys]) - maximum[at])
        d_scores = weights * (_batched(g[at], v[:, :, :keys], 2) - common[at])
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
        d_q.append(_batched(d_scores, block_keys, 1))
        d_k = d_k.at[..., :keys].add(_sum_over_queries(queries[at], d_scores))
        d_v = d_v.at[..., :keys].add(_sum_over_queries(g[at], weights))
    d_k, d_v = (x.swapaxes(2, 3).astype(q.dtype) for x in (d_k, d_v))
    return _by_token(jnp.concatenate(d_q, axis=3).astype(q.dtype)), d_k, d_v, None


xla.defvjp(_xla_forward, _xla_backward)


def causal_blocks(length: int, slots: int) -> list[tuple[int, int, int]]:
    """For each block, its queries (start, end) and the number of keys that it reads."""
    if length != slots:
        return [(0, length, slots)]
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    return [(start, min(start + size, length), min(start + size, length)) for start in range(0, length, size)]


def _by_query_group(x, kv_heads):
    """[B, T, N, H] -> [B, K, G, T, H]: with batch and kv head leading, every product is one batched matrix product."""
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1]).transpose(0, 2, 3, 1, 4)


def _by_token(x):
    """The inverse."""
    batch, kv_heads, group, length, head_dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head_dim)


def _scores(queries, keys, mask):
    return jnp.where(mask[:, None, None], _batched(queries, keys, 2), jnp.finfo(jnp.float32).min)


def _batched(a, b, axis: int):
    """a [B, K, G, T, n], b [B, K, …] with n along axis 1 or 2 of its matrices -> float32 [B, K, G, T, other]."""
    rows = a.reshape(*a.shape[:2], -1, a.shape[-1])
    return product(rows, b, ((3,), (1 + axis,)), ((0, 1), (0, 1))).reshape(*a.shape[:4], -1)


def _sum_over_queries(a, b):
    """a [B, K, G, T, m], b [B, K, G, T, n] -> float32 [B, K, m, n]; m is the smaller."""
    a, b = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (a, b))
    return product(transposed_copy(a), b, ((3,), (2,)), ((0, 1), (0, 1)))


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """As `xla`. It gets the full mask: cuDNN's own handling of packed rows is reported to leak between segments."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=1.0, implementation="cudnn")


def splash(q, k, v, segment_ids, window: jax.Array | None, windows: tuple[int, ...], interpret: bool) -> jax.Array:
    """As `xla`, for rows that attend to themselves, segment_ids [B, T]: JAX's TPU kernel, which skips masked blocks.

    Remat "dots" saves its residuals. Each device computes its own rows and heads.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library  # takes a second to import

    length, window_sizes = q.shape[1], sorted(set(windows)) or [0]
    size = next(size for size in (SPLASH_BLOCK, 256, LANES) if length % size == 0)
    blocks = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    block_sizes = library.BlockSizes(**dict.fromkeys((*blocks, "block_q_dq", "block_kv_dq"), size))

    def kernel(heads: int, window: int):
        shape = (length, length)
        mask = library.LocalMask(shape, (window - 1, 0), 0) if window else library.CausalMask(shape)
        attention = library.make_splash_mha(
            library.MultiHeadMask([mask] * heads),
            block_sizes=block_sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=SAVED,
            interpret=interpret,
        )
        return jax.vmap(lambda q, k, v, segments: attention(q, k, v, library.SegmentIds(segments, segments)))

    def on_device(q, k, v, segment_ids, index):
        kernels = [kernel(q.shape[2], window) for window in window_sizes]
        arrays = (q.swapaxes(1, 2), k, v, segment_ids)
        y = kernels[0](*arrays) if len(kernels) == 1 else jax.lax.switch(index, kernels, *arrays)
        return y.swapaxes(1, 2)

    index = jnp.int32(0) if window is None else jnp.searchsorted(jnp.asarray(window_sizes), window)
    if jax.sharding.get_abstract_mesh().empty:
        return on_device(q, k, v, segment_ids, index)
    queries = mesh_lib.spec(("batch", "length", "heads", "head_dim"))
    keys = mesh_lib.spec(("batch", "kv_heads", "length", "head_dim"))
    specs = (queries, keys, keys, mesh_lib.spec(("batch", "length")), PartitionSpec())
    return jax.shard_map(on_device, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, segment_ids, index)


AUTO = "auto"
INTERPRETED = "splash, interpreted"  # without a TPU: slow, to see what it computes


def choose_backend(wanted: str, platform: str, dtype: jnp.dtype, head_dim: int, length: int) -> str:
    """The backend for rows of `length` tokens; `wanted` is "auto", "xla", "cudnn" or "splash". UserError if that one cannot."""
    backend = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla") if wanted == AUTO else wanted
    fits = supports_length(backend, length)
    obstacles: dict[str, dict] = {
        "splash": {
            "is for TPUs": platform == "gpu",
            f"needs rows of a multiple of {LANES} tokens, and config.data.max_length is {length}": not fits,
        },
        "cudnn": {
            "is for NVIDIA GPUs": platform != "gpu",
            f"computes in bfloat16, and config.dtype is {jnp.dtype(dtype)}": dtype not in (jnp.bfloat16, jnp.float16),
            f"needs heads of a multiple of 8 up to 128 and rows of even length; they are {head_dim} and {length}": (
                head_dim > 128 or head_dim % 8 or not fits
            ),
        },
    }
    reason = next((what for what, obstructs in obstacles.get(backend, {}).items() if obstructs), None)
    if reason and wanted == AUTO:
        return "xla"
    if reason:
        raise UserError(f"config.attention={wanted!r} {reason}; use 'auto', which takes the best one that works")
    return INTERPRETED if backend == "splash" and platform == "cpu" else backend


def supports_length(backend: str, length: int) -> bool:
    """Whether the backend takes rows of `length` tokens."""
    return length % {"splash": LANES, INTERPRETED: LANES, "cudnn": 2}.get(backend, 1) == 0


def verify_backend(backend: str, wanted: str, dtype: jnp.dtype, c: ModelConfig) -> str:
    """The backend if it computes the right values on these devices; else "xla" with a warning, or UserError if `wanted`
    names the backend."""
    if backend == "xla":
        return backend
    try:
        wrong = compare_with_xla(backend, dtype, c)
    except Exception as error:  # of any type: a library, a driver or a compiler raises it
        wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if wrong and wanted != AUTO:
        raise UserError(f"config.attention={wanted!r} cannot be used here: {wrong}; leave it at 'auto'")
    if wrong:
        warnings.warn(f"attention is computed by 'xla', not by {backend!r}: {wrong}", stacklevel=2)
    return "xla" if wrong else backend


def compare_with_xla(backend: str, dtype: jnp.dtype, c: ModelConfig) -> str | None:
    """What the backend computes wrongly on these devices, or None: a kernel that leaks between packed examples would go
    unnoticed for a whole run.

    On one row of two segments, results and gradients must be close to those of `xla`, and the first segment's must be
    bitwise the same whatever the second one holds.
    """
    rng = np.random.default_rng(0)
    length, middle = 2 * LANES, LANES + 7
    segments = jnp.asarray(np.where(np.arange(length) < middle, 1, 2)[None].astype(np.int32))
    mask = AttentionMask(segments, causal_mask(jnp.arange(length), segments, segments))
    draw = lambda axis, count: jnp.asarray(rng.normal(size=np.insert([1, length, c.head_dim], axis, count)), dtype)  # noqa: E731
    q, k, v = draw(2, c.heads) / math.sqrt(c.head_dim), draw(1, c.kv_heads), draw(1, c.kv_heads)
    cotangent = draw(2, c.heads)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def results(backend, size, q, k, v):
        window = None if size is None else jnp.int32(size)
        y, vjp = jax.vjp(lambda q, k, v: attend(backend, q, k, v, mask, 0, window, c.windows), q, k, v)
        return [x.astype(jnp.float32) for x in (y, *vjp(cotangent))]

    tolerance = 1e-4 if dtype == jnp.float32 else 3e-2
    sizes: list[int | None] = [*sorted(set(c.windows))] or [None]
    for size in sizes:
        found, expected = jax.device_get((results(backend, size, q, k, v), results("xla", size, q, k, v)))
        error = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True))
        if not error <= tolerance:
            return f"its results or gradients are {error:.1e} of the largest one away from those of 'xla'"
        changed = [q.at[:, middle:].add(1), *(x.at[:, :, middle:].add(1) for x in (k, v))]
        for a, b, token_axis in zip(found, jax.device_get(results(backend, size, *changed)), (1, 1, 2, 2), strict=True):
            if not np.array_equal(a.take(range(middle), token_axis), b.take(range(middle), token_axis)):
                return "examples packed into one row see each other"
    return None
