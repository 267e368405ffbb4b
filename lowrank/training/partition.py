"""One mask decides what is trained; the program carries two trees with holes.

The mask is a tree of booleans over all variables (`params` and `lora`). `split` divides the variables by it into `trainable`
and `frozen`: two trees of the same structure, each with `None` where the other has the array. For JAX `None` is no leaf, so
gradients, optimizer state, checkpoints and norms over `trainable` contain nothing of the base: it is frozen by absence.
"""

import jax
import numpy as np


def trainable_mask(variables: dict, mode: str) -> dict:
    """A tree of booleans over `variables`. "lora": every adapter leaf. "full": every leaf of the base."""
    collection = {"lora": "lora", "full": "params"}[mode]
    return {name: jax.tree.map(lambda _, on=name == collection: on, tree) for name, tree in variables.items()}


def split(tree: dict, mask: dict) -> tuple[dict, dict]:
    """tree -> (trainable, frozen), with holes; the exact inverse of `merge`."""
    trainable = jax.tree.map(lambda on, leaf: leaf if on else None, mask, tree)
    frozen = jax.tree.map(lambda on, leaf: None if on else leaf, mask, tree)
    return trainable, frozen


def merge(trainable: dict, frozen: dict) -> dict:
    """Two trees with complementary holes -> the whole tree."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)


def optimizer_labels(mask: dict) -> dict:
    """The labels for `optax.partition`: "frozen", "undecayed" (norms and biases) or "decayed"."""

    def label(path, on):
        if not on:
            return "frozen"
        return "undecayed" if path[-1].key in ("scale", "bias") else "decayed"

    return jax.tree_util.tree_map_with_path(label, mask)


def named_leaves(tree) -> dict[str, jax.Array]:
    """Leaves by their paths, as `lora/layers/self_attn/q_proj/lora_a`; holes are left out."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_name(path) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def misfits(found, wanted) -> list[str]:
    """How the names and shapes of `found` differ from those of `wanted`: a line each."""
    found_shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(found).items()}
    wanted_shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(wanted).items()}
    return [
        f"{name} is {found_shapes.get(name, 'absent')} there and {wanted_shapes.get(name, 'absent')} here"
        for name in sorted(found_shapes.keys() | wanted_shapes.keys())
        if found_shapes.get(name) != wanted_shapes.get(name)
    ]


def count(tree) -> int:
    """Elements of all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def nbytes(tree) -> int:
    """Bytes of all leaves (of their global shapes)."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
