"""The loss, as a sum and a count: cross-entropy of the trained tokens, never with logits for all tokens at once.

Both are summed over micro-batches and devices and divided once, in the step. So accumulation equals the large batch
exactly, however unequally the trained tokens fall into the parts.

The loss is the end of the program, so its gradient needs nothing from behind it: a chunk's logits become the gradients of
its hidden states, and of the head if that is trained, right where they are, in the forward pass. Nothing of them is kept and
nothing is computed twice.
"""

import functools

import jax
import jax.numpy as jnp

from lowrank.model.products import dot, product
from lowrank.parallel.mesh import constrain

CHUNK_TOKENS = 512  # tokens a device, whose logits exist at one time


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(
    hidden: jax.Array,  # [B, T, D]
    head: jax.Array,  # [D, V]
    targets: jax.Array,  # int32 [B, T]
    loss_mask: jax.Array,  # bool [B, T]
    shards: int = 1,  # devices that the rows are spread over
) -> jax.Array:
    """float32 scalar: sum of -log p(target) over the tokens that the mask is on for."""
    return jnp.sum(token_losses(hidden, head, targets, loss_mask, shards))


def _with_gradients(hidden, head, targets, loss_mask, shards):
    """-> the same sum; its gradients to hidden and, if the head is trained, to the head."""
    hidden, head, targets, loss_mask, trained = hidden.value, head.value, targets.value, loss_mask.value, head.perturbed
    chunks, order = _in_chunks(hidden, targets, loss_mask, shards)
    matrix = head.astype(hidden.dtype)

    def gradients(x, targets, mask):
        logits = constrain(dot(x, matrix), "batch", None, "vocab")
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = (top + jnp.log(total))[..., 0] - target_logits
        mask = mask[..., None]
        d_logits = (weights * (mask / total) - jnp.where(is_target, mask, 0)).astype(x.dtype)
        d_x = product(d_logits, matrix, ((2,), (1,))).astype(x.dtype)
        d_head = product(x, d_logits, ((0, 1), (0, 1))) if trained else None
        return jnp.sum(losses * mask[..., 0]), d_x, d_head

    def nothing(x, targets, mask):
        return jnp.float32(0), jnp.zeros_like(x), jnp.zeros(head.shape, jnp.float32) if trained else None

    def add(carry, chunk):
        total, d_head = carry
        loss, d_x, own = jax.lax.cond(jnp.any(chunk[2]), gradients, nothing, *chunk)
        return (total + loss, d_head + own if trained else None), d_x

    start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32) if trained else None)
    (total, d_head), d_hidden = jax.lax.scan(add, start, chunks)
    d_hidden = _in_order(d_hidden, order)
    return total, (d_hidden, d_head.astype(head.dtype) if trained else None)


def _scaled(shards, gradients, by):
    d_hidden, d_head = gradients
    d_hidden = (d_hidden * by).astype(d_hidden.dtype)
    return d_hidden, None if d_head is None else (d_head * by).astype(d_head.dtype), None, None


cross_entropy_sum.defvjp(_with_gradients, _scaled, symbolic_zeros=True)


def token_losses(hidden, head, targets, loss_mask, shards: int = 1) -> jax.Array:
    """As `cross_entropy_sum`, one by one and without gradients: float32 [B, T], 0 where the mask is off."""
    chunks, order = _in_chunks(hidden, targets, loss_mask, shards)
    head = head.astype(hidden.dtype)

    def losses(x, targets, mask):
        logits = constrain(dot(x, head), "batch", None, "vocab")
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - target_logits) * mask

    def losses_of(_, chunk):
        return None, jax.lax.cond(jnp.any(chunk[2]), losses, lambda x, *_: jnp.zeros(x.shape[:2], jnp.float32), *chunk)

    _, result = jax.lax.scan(losses_of, None, chunks)
    return _in_order(result, order)


def _in_chunks(hidden, targets, loss_mask, shards):
    """-> the three cut into chunks [chunks, B, columns, …]; the order in which tokens are in them.

    In each row the trained tokens are moved to the front (a stable sort of the mask, row by row, so that no token
    leaves its device); then the row is walked in chunks, and a chunk in which no row has a trained token is skipped.
    """
    batch, length, _ = hidden.shape
    order = jnp.argsort(~loss_mask, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets, loss_mask = jnp.take_along_axis(targets, order, axis=1), jnp.take_along_axis(loss_mask, order, axis=1)
    columns = min(length, max(1, CHUNK_TOKENS * shards // batch))
    chunks = -(-length // columns)

    def chunked(x):
        x = jnp.pad(x, [(0, 0), (0, chunks * columns - length)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(batch, chunks, columns, *x.shape[2:]), 1, 0)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return (chunked(hidden), chunked(targets), chunked(loss_mask)), order


def _in_order(chunks, order):
    """Chunks [chunks, B, columns, …] -> [B, T, …], each token in its own place again."""
    rows = jnp.moveaxis(chunks, 0, 1)
    rows = rows.reshape(len(order), -1, *rows.shape[3:])[:, : order.shape[1]]
    back = jnp.argsort(order, axis=1).reshape(*order.shape, *[1] * (rows.ndim - 2))
    return jnp.take_along_axis(rows, back, axis=1)
