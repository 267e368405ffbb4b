"""Nested dicts, addressed by paths of names: config values, parameter trees, the contents of a checkpoint."""

from collections.abc import Sequence
from typing import Any


def set_path(tree: dict, path: Sequence[str], value: Any) -> None:
    """`tree[path[0]][path[1]]… = value`; missing dicts are made. ValueError where a value stands in the way of the path."""
    *parents, last = path
    for i, parent in enumerate(parents):
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{'.'.join(parents[: i + 1])} holds a value, not keys")
    tree[last] = value
