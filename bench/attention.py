"""Self-attention of the decoder beside the textbook's and `jax.nn.dot_product_attention`: CPU seconds, forward and backward.

    taskset -c 0 python bench/attention.py [--length=512] [--heads=8] [--kv_heads=4] [--head_dim=8] [--dtype=bfloat16]

Times are CPU seconds of this process, the best of several rounds in which the candidates take turns, because the wall
clock of a shared machine measures its neighbours. The last column is the ratio to the textbook.
"""

import math
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from lowrank.model.kernels import causal_mask, xla

flags.DEFINE_integer("rows", 4, "Rows of the batch.")
flags.DEFINE_integer("length", 512, "Tokens of a row.")
flags.DEFINE_integer("heads", 8, "Query heads.")
flags.DEFINE_integer("kv_heads", 4, "Key and value heads.")
flags.DEFINE_integer("head_dim", 8, "Size of a head.")
flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of q, k and v.")
flags.DEFINE_integer("rounds", 5, "Each candidate is timed so often.")
FLAGS = flags.FLAGS


def textbook(q, k, v, mask):
    """Scores of every query with every key, softmax, values."""
    batch, length, heads, head_dim = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1).astype(q.dtype)
    y = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, preferred_element_type=jnp.float32)
    return y.reshape(batch, length, heads, head_dim).astype(q.dtype)


def main(_):
    rows, length, dtype = FLAGS.rows, FLAGS.length, jnp.dtype(FLAGS.dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (rows, length, FLAGS.heads, FLAGS.head_dim), dtype)
    k, v = (jax.random.normal(key, (rows, length, FLAGS.kv_heads, FLAGS.head_dim), dtype) for key in keys[1:])
    segments = jnp.broadcast_to(1 + jnp.arange(length) // 150, (rows, length))
    mask = causal_mask(jnp.arange(length), segments, segments)
    candidates = {
        "textbook": textbook,
        "jax.nn": lambda q, k, v, mask: jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]),
        "lowrank": lambda q, k, v, mask: xla(q / math.sqrt(q.shape[-1]), k.swapaxes(1, 2), v.swapaxes(1, 2), mask),
    }

    def gradient(f):
        return jax.jit(jax.grad(lambda q, k, v: jnp.sum(jnp.square(f(q, k, v, mask).astype(jnp.float32))), (0, 1, 2)))

    programs = {}
    for name, f in candidates.items():
        programs[name, "forward"] = jax.jit(lambda q, k, v, f=f: f(q, k, v, mask))
        programs[name, "forward + backward"] = gradient(f)
    best = dict.fromkeys(programs, math.inf)
    for _ in range(1 + FLAGS.rounds):  # the first round compiles
        for key, program in programs.items():
            start = time.process_time()
            jax.block_until_ready(program(q, k, v))
            best[key] = min(best[key], time.process_time() - start)
    print(f"q {q.shape}, kv heads {FLAGS.kv_heads}, {dtype}, {jax.devices()[0].device_kind}")
    for (name, what), seconds in best.items():
        print(f"{name:<10} {what:<20} {1e3 * seconds:8.1f} ms   {best['textbook', what] / seconds:5.2f}x")


if __name__ == "__main__":
    app.run(main)
