"""What an adapter's updates look like as linear maps: their singular values, directions, and what they amplify.

After section 7 of the LoRA paper (Hu et al., 2021). All of it is small: delta W = scale · lora_a @ lora_b has at most
`rank` singular values, which the QR decompositions of the two factors bring down to a [rank, rank] problem. Directions
are on the input side [in], those that the paper calls right-singular (torch's W is the transpose of ours).
"""

from typing import NamedTuple

import numpy as np


class Update(NamedTuple):
    """delta W of one projection in one layer, decomposed: delta W = left @ diag(values) @ right.T."""

    left: np.ndarray  # [in, rank], orthonormal: input directions, the largest first
    values: np.ndarray  # [rank], descending
    right: np.ndarray  # [out, rank], orthonormal: output directions


def decompose(lora_a: np.ndarray, lora_b: np.ndarray, scale: float) -> Update:
    """lora_a [in, rank], lora_b [rank, out] -> the singular value decomposition of scale · lora_a @ lora_b, in float64."""
    q_a, r_a = np.linalg.qr(lora_a.astype(np.float64))
    q_b, r_b = np.linalg.qr(lora_b.T.astype(np.float64))
    left, values, right = np.linalg.svd(scale * r_a @ r_b.T, full_matrices=False)
    return Update(q_a @ left, values, q_b @ right.T)


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli, 2007): 1 for one value, n for n equal ones."""
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))


def input_directions(lora_a: np.ndarray) -> np.ndarray:
    """lora_a [in, rank] -> its orthonormal input directions [in, rank], the strongest first."""
    return np.linalg.svd(lora_a.astype(np.float64), full_matrices=False)[0]


def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Directions [in, r1] and [in, r2] -> φ(i, j) [r1, r2], i and j counted from 1 (section 7.2, equation 4).

    φ(i, j) = ‖one[:, :i].T @ other[:, :j]‖² / min(i, j): 1 where one span holds the other, 0 where they are orthogonal.
    """
    overlap = np.cumsum(np.cumsum((one.T @ other) ** 2, axis=0), axis=1)
    i, j = np.indices(overlap.shape) + 1
    return overlap / np.minimum(i, j)


class Amplification(NamedTuple):
    """Section 7.3, table 7: Frobenius norms of W seen through the update's own directions."""

    update: float  # ‖delta W‖
    base: float  # ‖W‖
    through_update: float  # ‖left.T W right‖: how much of W lies in the directions that the update acts in
    through_base: float  # the same through W's own `rank` strongest directions
    through_random: float  # and through random ones: the root of the mean of ‖·‖², rank ‖W‖ / sqrt(in · out)

    @property
    def factor(self) -> float:
        """How many times stronger the update makes the directions that it acts in."""
        return self.update / self.through_update


def amplification(kernel: np.ndarray, update: Update, rank: int) -> Amplification:
    """kernel [in, out]; `rank`: how many of the update's directions are looked at, no more than there are."""
    kernel = kernel.astype(np.float64)
    rank = min(rank, *kernel.shape)
    left, right = update.left[:, :rank], update.right[:, :rank]
    norm = np.linalg.norm(kernel)
    return Amplification(
        update=float(np.linalg.norm(update.values[:rank])),
        base=float(norm),
        through_update=float(np.linalg.norm(left.T @ kernel @ right)),
        through_base=float(np.linalg.norm(strongest_values(kernel, rank))),
        through_random=float(rank * norm / np.sqrt(kernel.size)),
    )


def strongest_values(kernel: np.ndarray, rank: int, rounds: int = 8) -> np.ndarray:
    """The `rank` largest singular values of kernel [in, out], by subspace iteration.

    Within some percent where the spectrum is flat; a full decomposition of a 4096 x 4096 kernel takes a minute.
    """
    width = min(rank + 8, *kernel.shape)
    basis = np.random.default_rng(0).normal(size=(kernel.shape[1], width))
    for _ in range(rounds):
        basis = np.linalg.qr(kernel.T @ np.linalg.qr(kernel @ basis)[0])[0]
    return np.linalg.svd(kernel @ basis, compute_uv=False)[:rank]
