"""The loss, as a sum and a count: cross-entropy of the trained tokens, never with logits for all tokens at once.

Both are summed over micro-batches and devices and divided once, in the step. So accumulation equals the large batch
exactly, however unequally the trained tokens fall into the parts.
"""

import jax
import jax.numpy as jnp

from lowrank.model.lora import dot
from lowrank.parallel.mesh import constrain

CHUNK_TOKENS = 1024  # tokens a device, whose logits exist at one time


def cross_entropy_sum(
    hidden: jax.Array,  # [B, T, D]
    head: jax.Array,  # [D, V]
    targets: jax.Array,  # int32 [B, T]
    loss_mask: jax.Array,  # bool [B, T]
    shards: int = 1,  # devices that the rows are spread over
) -> jax.Array:
    """float32 scalar: sum of -log p(target) over the tokens that the mask is on for."""
    losses_of, chunks, _ = _in_chunks(hidden, head, targets, loss_mask, shards)
    total, _ = jax.lax.scan(lambda total, chunk: (total + jnp.sum(losses_of(chunk)), None), jnp.float32(0), chunks)
    return total


def token_losses(hidden, head, targets, loss_mask, shards: int = 1) -> jax.Array:
    """As `cross_entropy_sum`, one by one: float32 [B, T], 0 where the mask is off."""
    losses_of, chunks, order = _in_chunks(hidden, head, targets, loss_mask, shards)
    _, losses = jax.lax.scan(lambda _, chunk: (None, losses_of(chunk)), None, chunks)  # [chunks, B, columns]
    losses = jnp.moveaxis(losses, 0, 1).reshape(len(targets), -1)[:, : targets.shape[1]]
    return jnp.take_along_axis(losses, jnp.argsort(order, axis=1), axis=1)


def _in_chunks(hidden, head, targets, loss_mask, shards):
    """-> (chunk -> float32 [B, columns]: the losses of its tokens; the chunks, stacked; the order of tokens in them).

    In each row the trained tokens are moved to the front (a stable sort of the mask, row by row, so that no token
    leaves its device); then the row is walked in chunks, and a chunk in which no row has a trained token is skipped.
    `jax.checkpoint` makes the backward pass compute a chunk's logits again instead of keeping them. It goes around the
    `cond`, not into it: what a branch needs is a result of the `cond`, and of the head the scan kept a copy for each chunk.
    """
    batch, length, _ = hidden.shape
    order = jnp.argsort(~loss_mask, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets, loss_mask = jnp.take_along_axis(targets, order, axis=1), jnp.take_along_axis(loss_mask, order, axis=1)

    columns = min(length, max(1, CHUNK_TOKENS * shards // batch))
    chunks = -(-length // columns)

    def chunked(x):  # [B, T, ...] -> [chunks, B, columns, ...]
        x = jnp.pad(x, [(0, 0), (0, chunks * columns - length)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(batch, chunks, columns, *x.shape[2:]), 1, 0)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    head = head.astype(hidden.dtype)

    def losses(x, targets, mask):
        logits = constrain(dot(x, head), "batch", None, "vocab")
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - target_logits) * mask

    @jax.checkpoint
    def losses_of(chunk):
        return jax.lax.cond(jnp.any(chunk[2]), losses, lambda *_: jnp.zeros((batch, columns), jnp.float32), *chunk)

    return losses_of, (chunked(hidden), chunked(targets), chunked(loss_mask)), order
