"""Which query sees which key, and three ways to compute attention by that: `xla` everywhere, `splash` on a TPU, `cudnn` on
a GPU. All do grouped queries, packed rows and windows, forward and backward.

Queries come scaled by 1/sqrt(H): where they are rotated, in float32, that costs nothing, and no kernel has to be asked
whether it scales. Scores and softmax are in float32. The kernels are for rows that attend to themselves; with a cache, or
where a row's length does not suit them, it is `xla`.
"""

import math
import typing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.model.cpu import transposed_copy
from lowrank.model.products import KEPT, kept_bits, product
from lowrank.parallel import mesh as mesh_lib

BACKENDS = ("xla", "cudnn", "splash")
PIECES = 8  # that a row's queries are cut into at most
SMALLEST = 64  # queries in a piece, at least
LANES = 128  # rows of splash are a multiple of this
BLOCK = 512  # of queries and of keys in splash, at most


class AttentionMask(typing.NamedTuple):
    """A query sees a key if both have the same segment, the key's slot is not later and, in a layer with a window, not
    too far back. `mask` says the first two in full, for whoever wants it so."""

    segments: jax.Array  # int32 [B, T], of the queries
    mask: jax.Array | None  # bool [B, T, S]


def causal_mask(query_slots: jax.Array, query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """Slots [T], segments [B, T] and [B, S] -> bool [B, T, S]: which query sees which key."""
    causal = query_slots[:, None] >= jnp.arange(key_segments.shape[1])[None, :]
    return causal & (query_segments[:, :, None] == key_segments[:, None, :])


def window_mask(query_slots: jax.Array, key_slots: int, window: jax.Array) -> jax.Array:
    """Slots [T], number of key slots S -> bool [T, S]: which key is among the `window` last ones, the query's own
    included; all are where `window` is 0."""
    distance = query_slots[:, None] - jnp.arange(key_slots)[None, :]
    return (distance < window) | (window == 0)


def attend(
    backend: str, q, k, v, sees: AttentionMask, slot=0, window: jax.Array | None = None, windows: tuple[int, ...] = ()
):
    """q [B, T, N, H] (scaled; its first token is in `slot`), k and v [B, K, S, H] -> [B, T, N, H].

    `window`: int32, of this layer, one of `windows`; 0 or None is no window. `backend`: as `chosen` gives it.
    """
    if backend.startswith("splash"):
        return splash(q, k, v, sees.segments, window, windows, interpret=backend == INTERPRETED)
    mask = sees.mask
    if window is not None:
        mask = mask & window_mask(slot + jnp.arange(q.shape[1]), k.shape[2], window)
    return cudnn(q, k, v, mask) if backend == "cudnn" else xla(q, k, v, mask)


# ---- xla -------------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B, T, N, H], k and v [B, K, S, H], mask [B, T, S] -> [B, T, N, H].

    When a row attends to itself, queries go in causal pieces, each of which sees only the keys up to its own end: half
    the arithmetic, a fraction of the memory. Scores are forgotten and computed again in the backward pass, which is
    written out (FlashAttention's, Dao et al., 2022, https://arxiv.org/abs/2205.14135) because it needs no second softmax.
    """
    return _xla(q, k, v, mask)[0]


def _xla(q, k, v, mask):
    """-> the result; each query's largest score and sum of weights, float32 [B, K, G, T, 1]."""
    queries = _by_query_group(q, k.shape[1])
    results, tops, totals = [], [], []
    for start, end, seen in pieces(q.shape[1], k.shape[2]):
        scores = _scores(queries[..., start:end, :], k[:, :, :seen], mask[:, start:end, :seen])
        tops.append(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - tops[-1])
        totals.append(jnp.sum(weights, axis=-1, keepdims=True))
        # The softmax's division comes after the product with the values: H columns to divide instead of S.
        results.append(_batched(weights.astype(q.dtype), v[:, :, :seen], 1) / totals[-1])
    y, top, total = (jnp.concatenate(parts, axis=3) for parts in (results, tops, totals))
    return _by_token(y.astype(q.dtype)), top, total


def _xla_forward(q, k, v, mask):
    y, top, total = (kept_bits(part) for part in _xla(q, k, v, mask))
    return y, (q, k, v, mask, y, top, total)


def _xla_backward(needed, g):
    q, k, v, mask, y, top, total = needed
    queries = _by_query_group(q, k.shape[1])
    g, y = (_by_query_group(x, k.shape[1]).astype(jnp.float32) for x in (g, y))
    common = jnp.sum(g * y, axis=-1, keepdims=True) / total  # what a softmax takes off the gradients of its scores
    g = (g / total).astype(q.dtype)
    d_q, d_k = [], jnp.zeros(k.swapaxes(2, 3).shape, jnp.float32)  # [B, K, H, S]
    d_v = d_k
    for start, end, seen in pieces(q.shape[1], k.shape[2]):
        at, own_keys = (..., slice(start, end), slice(None)), k[:, :, :seen]
        weights = jnp.exp(_scores(queries[at], own_keys, mask[:, start:end, :seen]) - top[at])
        d_scores = weights * (_batched(g[at], v[:, :, :seen], 2) - common[at])
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
        d_q.append(_batched(d_scores, own_keys, 1))
        d_k = d_k.at[..., :seen].add(_over_queries(queries[at], d_scores))
        d_v = d_v.at[..., :seen].add(_over_queries(g[at], weights))
    d_q = _by_token(jnp.concatenate(d_q, axis=3).astype(q.dtype))
    d_k, d_v = (x.swapaxes(2, 3).astype(q.dtype) for x in (d_k, d_v))
    return d_q, d_k, d_v, None


xla.defvjp(_xla_forward, _xla_backward)


def pieces(length: int, slots: int) -> list[tuple[int, int, int]]:
    """What a piece's queries are (start, end), and how many keys it sees."""
    if length != slots:
        return [(0, length, slots)]
    size = max(SMALLEST, -(-length // PIECES))
    return [(start, min(start + size, length), min(start + size, length)) for start in range(0, length, size)]


def _by_query_group(x, kv_heads):
    """[B, T, N, H] -> [B, K, G, T, H]: batch and kv head lead, so that every product is one plain batch of matrices."""
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


def _over_queries(a, b):
    """a [B, K, G, T, m], b [B, K, G, T, n] -> float32 [B, K, m, n], summed over the queries. m is the small one."""
    a, b = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (a, b))
    return product(transposed_copy(a), b, ((3,), (2,)), ((0, 1), (0, 1)))


# ---- cudnn -----------------------------------------------------------------------------------------------------------


def cudnn(q, k, v, mask):
    """As `xla`. The mask goes in whole: cuDNN's own notion of packed rows is reported to let segments see each other."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=1.0, implementation="cudnn")


# ---- splash ----------------------------------------------------------------------------------------------------------


def splash(q, k, v, segments, window, windows: tuple[int, ...], interpret: bool):
    """As `xla`, of rows whose tokens see each other by segments [B, T]: JAX's kernel for TPUs, which skips what no query sees.

    What it needs for the backward pass is kept by remat "dots". Each device computes its own rows and heads.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library  # takes a second to import

    length, kinds = q.shape[1], sorted(set(windows)) or [0]
    size = next(size for size in (BLOCK, 256, LANES) if length % size == 0)
    blocks = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    blocks = library.BlockSizes(**dict.fromkeys((*blocks, "block_q_dq", "block_kv_dq"), size))

    def kernel(heads: int, window: int):
        seen = (
            library.LocalMask((length, length), (window - 1, 0), 0) if window else library.CausalMask((length, length))
        )
        made = library.make_splash_mha(
            library.MultiHeadMask([seen] * heads),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=KEPT,
            interpret=interpret,
        )
        return jax.vmap(lambda q, k, v, segments: made(q, k, v, library.SegmentIds(segments, segments)))

    def of_device(q, k, v, segments, kind):
        kernels = [kernel(q.shape[2], window) for window in kinds]
        arrays = (q.swapaxes(1, 2), k, v, segments)
        y = kernels[0](*arrays) if len(kernels) == 1 else jax.lax.switch(kind, kernels, *arrays)
        return y.swapaxes(1, 2)

    kind = jnp.int32(0) if window is None else jnp.searchsorted(jnp.asarray(kinds), window)
    if jax.sharding.get_abstract_mesh().empty:
        return of_device(q, k, v, segments, kind)
    queries = mesh_lib.spec(("batch", "length", "heads", "head_dim"))
    keys = mesh_lib.spec(("batch", "kv_heads", "length", "head_dim"))
    parts = (queries, keys, keys, mesh_lib.spec(("batch", "length")), PartitionSpec())
    return jax.shard_map(of_device, in_specs=parts, out_specs=queries, check_vma=False)(q, k, v, segments, kind)


# ---- Which -----------------------------------------------------------------------------------------------------------

AUTO = "auto"
INTERPRETED = "splash, interpreted"  # where there is no TPU: to see what it computes, slowly
BEST = {"tpu": "splash", "gpu": "cudnn"}


def choose_backend(wanted: str, platform: str, dtype: jnp.dtype, head_dim: int, length: int) -> str:
    """The backend for rows of `length` tokens; `wanted` is "auto" or one of BACKENDS. Raises UserError if that one cannot."""
    backend = BEST.get(platform, "xla") if wanted == AUTO else wanted
    reason = _unsuited(backend, platform, dtype, head_dim, length)
    if reason and wanted == AUTO:
        return "xla"
    if reason:
        raise UserError(f"config.attention={wanted!r} {reason}; 'auto' takes what suits")
    return INTERPRETED if backend == "splash" and platform == "cpu" else backend


def suits(backend: str, length: int) -> bool:
    """Whether it computes rows of so many tokens."""
    return length % {"splash": LANES, INTERPRETED: LANES, "cudnn": 2}.get(backend, 1) == 0


def _unsuited(backend: str, platform: str, dtype: jnp.dtype, head_dim: int, length: int) -> str | None:
    if backend == "splash":
        if platform == "gpu":
            return "is for TPUs"
        if not suits(backend, length):
            return f"needs rows of a multiple of {LANES} tokens, and config.data.max_length is {length}"
    if backend == "cudnn":
        if platform != "gpu":
            return "is for NVIDIA GPUs"
        if dtype not in (jnp.bfloat16, jnp.float16):
            return f"computes in bfloat16, and config.dtype is {jnp.dtype(dtype)}"
        if head_dim > 128 or head_dim % 8 or not suits(backend, length):
            return f"needs heads of a multiple of 8 up to 128 and rows of even length; they are {head_dim} and {length}"
    return None


def verify_backend(backend: str, wanted: str, dtype: jnp.dtype, c: ModelConfig) -> str:
    """The backend, if it computes on the devices that are here what it should; else "xla", with a warning, or UserError
    where `wanted` names it."""
    if backend == "xla":
        return backend
    try:
        wrong = disagreement(backend, dtype, c.heads, c.kv_heads, c.head_dim, c.windows)
    except Exception as error:  # whatever a library, a driver or a compiler has against it
        wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if wrong and wanted != AUTO:
        raise UserError(f"config.attention={wanted!r} cannot be used here: {wrong}; leave it at 'auto'")
    if wrong:
        warnings.warn(f"attention is computed by 'xla', not by {backend!r}: {wrong}", stacklevel=2)
    return "xla" if wrong else backend


def disagreement(backend: str, dtype: jnp.dtype, heads: int, kv_heads: int, head_dim: int, windows: tuple[int, ...]):
    """What is wrong with the backend on the devices that are here, or None: a kernel that lets packed examples see each
    other would go unnoticed for the whole run. One row of two segments: results and gradients beside those of `xla`, and
    that the first segment's are bitwise the same whatever the second one is."""
    rng = np.random.default_rng(0)
    length, middle = 2 * LANES, LANES + 7
    segments = jnp.asarray(np.where(np.arange(length) < middle, 1, 2)[None].astype(np.int32))
    sees = AttentionMask(segments, causal_mask(jnp.arange(length), segments, segments))
    draw = lambda axis, count: jnp.asarray(rng.normal(size=np.insert([1, length, head_dim], axis, count)), dtype)  # noqa: E731
    q, k, v = draw(2, heads) / math.sqrt(head_dim), draw(1, kv_heads), draw(1, kv_heads)
    by = draw(2, heads)

    def results(backend, window, q, k, v):
        own = None if window is None else jnp.int32(window)
        y, transposed = jax.vjp(lambda q, k, v: attend(backend, q, k, v, sees, 0, own, windows), q, k, v)
        return [np.asarray(x, np.float32) for x in (y, *transposed(by))]

    allowed = 1e-4 if dtype == jnp.float32 else 3e-2
    for window in sorted(set(windows)) or [None]:
        found, expected = results(backend, window, q, k, v), results("xla", window, q, k, v)
        apart = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True))
        if not apart <= allowed:
            return f"its results or gradients are {apart:.1e} of the largest one away from those of 'xla'"
        others = results(
            backend, window, q.at[:, middle:].add(1), k.at[:, :, middle:].add(1), v.at[:, :, middle:].add(1)
        )
        axes = (1, 1, 2, 2)  # of tokens
        parts = [[x.take(range(middle), axis) for x, axis in zip(xs, axes, strict=True)] for xs in (found, others)]
        if not all(np.array_equal(a, b) for a, b in zip(*parts, strict=True)):
            return "examples packed into one row see each other"
    return None
