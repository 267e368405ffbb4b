"""Fingerprints: tell two sets of weights apart by reading a few megabytes of them."""

import hashlib
from collections.abc import Mapping

from lowrank.weights.tensor_file import Tensor

SAMPLES, SAMPLE_WIDTH, SMALL_BYTES = 16, 2048, 65_536


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes, dtypes and 16 samples along each tensor's diagonal (small tensors whole).

    Fine-tuning moves nearly every weight of a tensor that it trains, so samples of each tensor tell two models apart. For
    13 GB of weights they are 20 MB.
    """
    digest = hashlib.sha256()
    for tensor in tensors.values():
        for index in samples_of(tensor):
            tensor.expect(index)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.shape} {tensor.dtype}\n".encode())
        for index in samples_of(tensor):
            digest.update(tensor.read(index).tobytes())
    return digest.hexdigest()[:32]


def samples_of(tensor: Tensor) -> list[tuple[slice, ...]]:
    """Where the samples lie: each is up to 2048 elements of one row."""
    if tensor.nbytes <= SMALL_BYTES:
        return [tuple(slice(0, size) for size in tensor.shape)]
    widths = [1, *(min(size, SAMPLE_WIDTH) for size in tensor.shape[1:])]
    steps = [(size - width) / (SAMPLES - 1) for size, width in zip(tensor.shape, widths, strict=True)]
    return [
        tuple(slice(int(step * i), int(step * i) + width) for step, width in zip(steps, widths, strict=True))
        for i in range(SAMPLES)
    ]
