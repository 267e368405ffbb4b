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
    """float32 scalar: sum of -log p(target) over the tokens that the mask is on for.

    In each row the trained tokens are moved to the front (a stable sort of the mask, row by row, so that no token
    leaves its device); then the row is walked in chunks, and a chunk in which no row has a trained token is skipped.
    `jax.checkpoint` makes the backward pass compute a chunk's logits again instead of keeping them.
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

    @jax.checkpoint
    def chunk_sum(x, targets, mask):
        logits = constrain(dot(x, head), "batch", None, "vocab")
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - target_logits) * mask)

    def add_chunk(total, chunk):
        chunk_loss = jax.lax.cond(jnp.any(chunk[2]), chunk_sum, lambda *_: jnp.float32(0), *chunk)
        return total + chunk_loss, None

    total, _ = jax.lax.scan(add_chunk, jnp.float32(0), (chunked(hidden), chunked(targets), chunked(loss_mask)))
    return total
