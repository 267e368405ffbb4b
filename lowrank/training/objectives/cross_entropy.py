"""Cross-entropy of the trained tokens as a sum and a count; logits never exist for all tokens at once.

Sums and counts are added over micro-batches and devices and divided once, in the step. Accumulation therefore equals the
large batch exactly, however unequally the trained tokens fall into micro-batches.

The loss is the last operation of the program, so its gradient is computed in the forward pass: each chunk's logits become
the gradients of its hidden states (and of the head, if that is trained) at once, and no logits are kept or recomputed.
"""

import jax
import jax.numpy as jnp

from lowrank.model.products import dot, product
from lowrank.parallel.mesh import batch_shards, constrain

CHUNK_TOKENS = 512  # tokens per device whose logits exist at one time


@jax.custom_vjp
def cross_entropy_sum(
    hidden: jax.Array,  # [B, T, D]
    head: jax.Array,  # [D, V]
    targets: jax.Array,  # int32 [B, T]
    loss_mask: jax.Array,  # bool [B, T]
) -> jax.Array:
    """float32 scalar: sum of -log p(target) over the tokens that the mask is on for."""
    return jnp.sum(token_losses(hidden, head, targets, loss_mask))


def _forward(hidden, head, targets, loss_mask):
    """-> (the same sum, (gradient to hidden, gradient to the head or None if it is frozen))."""
    hidden, head, targets, loss_mask, trained = hidden.value, head.value, targets.value, loss_mask.value, head.perturbed
    chunks, order = _in_chunks(hidden, targets, loss_mask)
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


def _backward(gradients, by):
    d_hidden, d_head = gradients
    d_hidden = (d_hidden * by).astype(d_hidden.dtype)
    return d_hidden, None if d_head is None else (d_head * by).astype(d_head.dtype), None, None


cross_entropy_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def token_losses(hidden, head, targets, loss_mask) -> jax.Array:
    """Each token's loss, without gradients: float32 [B, T], 0 where the mask is off."""
    chunks, order = _in_chunks(hidden, targets, loss_mask)
    head = head.astype(hidden.dtype)

    def losses(x, targets, mask):
        logits = constrain(dot(x, head), "batch", None, "vocab")
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - target_logits) * mask

    def losses_of(_, chunk):
        return None, jax.lax.cond(jnp.any(chunk[2]), losses, lambda x, *_: jnp.zeros(x.shape[:2], jnp.float32), *chunk)

    _, result = jax.lax.scan(losses_of, None, chunks)
    return _in_order(result, order)


def _in_chunks(hidden, targets, loss_mask):
    """-> (the three arrays in chunks [chunks, B, columns, …], the order of the tokens in them [B, T]).

    Each row's trained tokens move to the front (a stable sort of the mask within the row, so no token leaves its device).
    A chunk in which no row has a trained token is then skipped.
    """
    batch, length, _ = hidden.shape
    order = jnp.argsort(~loss_mask, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets, loss_mask = jnp.take_along_axis(targets, order, axis=1), jnp.take_along_axis(loss_mask, order, axis=1)
    shards = batch_shards(jax.sharding.get_abstract_mesh())
    columns = min(length, max(1, CHUNK_TOKENS * shards // batch))
    chunks = -(-length // columns)

    def chunked(x):
        x = jnp.pad(x, [(0, 0), (0, chunks * columns - length)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(batch, chunks, columns, *x.shape[2:]), 1, 0)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return (chunked(hidden), chunked(targets), chunked(loss_mask)), order


def _in_order(chunks, order):
    """The inverse: chunks [chunks, B, columns, …] -> [B, T, …]."""
    rows = jnp.moveaxis(chunks, 0, 1)
    rows = rows.reshape(len(order), -1, *rows.shape[3:])[:, : order.shape[1]]
    back = jnp.argsort(order, axis=1).reshape(*order.shape, *[1] * (rows.ndim - 2))
    return jnp.take_along_axis(rows, back, axis=1)
