"""The decompositions behind `analyze`, against plain ones of the whole matrices."""

import numpy as np
import pytest

from lowrank.analysis import subspaces

DRAW = np.random.default_rng(0)
A, B = DRAW.normal(size=(30, 4)), DRAW.normal(size=(4, 20))


def test_an_update_is_decomposed_as_the_whole_matrix_is():
    update = subspaces.decompose(A, B, 0.5)
    values = np.linalg.svd(0.5 * A @ B, compute_uv=False)
    np.testing.assert_allclose(update.values, values[:4], rtol=1e-12)
    np.testing.assert_allclose(update.left * update.values @ update.right.T, 0.5 * A @ B, atol=1e-12)
    np.testing.assert_allclose(update.left.T @ update.left, np.eye(4), atol=1e-12)


@pytest.mark.parametrize(("values", "rank"), [([1, 1, 1, 0], 3.0), ([5, 0, 0, 0], 1.0), ([0, 0, 0, 0], 0.0)])
def test_the_effective_rank_counts_equal_directions(values, rank):
    assert subspaces.effective_rank(np.array(values, float)) == pytest.approx(rank)


def test_similarity_is_one_for_one_space_zero_for_orthogonal_ones_and_as_the_paper_defines_it():
    eye = np.eye(10)
    np.testing.assert_allclose(subspaces.similarity(eye[:, :3], eye[:, :3]), np.ones((3, 3)))
    np.testing.assert_allclose(subspaces.similarity(eye[:, :3], eye[:, 5:7]), np.zeros((3, 2)))
    one, other = subspaces.input_directions(A), subspaces.input_directions(DRAW.normal(size=(30, 6)))
    found = subspaces.similarity(one, other)
    assert found.shape == (4, 6)
    for i, j in ((1, 1), (2, 5), (4, 6), (4, 2)):
        direct = np.linalg.norm(one[:, :i].T @ other[:, :j], "fro") ** 2 / min(i, j)
        assert found[i - 1, j - 1] == pytest.approx(direct)


def test_what_is_amplified():
    kernel = np.diag([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])
    a, b = np.eye(6)[:, 3:4], 3 * np.eye(6)[3:4]  # three times the fourth direction, in which the kernel is 1
    seen = subspaces.amplification(kernel, subspaces.decompose(a, b, 2.0), 1)
    assert seen.update == pytest.approx(6.0)
    assert seen.through_update == pytest.approx(1.0)
    assert seen.through_base == pytest.approx(8.0)
    assert seen.factor == pytest.approx(6.0)
    assert seen.base == pytest.approx(np.linalg.norm(kernel))
    assert seen.through_random == pytest.approx(np.linalg.norm(kernel) / 6)


def test_random_directions_see_what_the_closed_form_says():
    kernel, rank = DRAW.normal(size=(20, 30)) * np.geomspace(1, 0.01, 30), 3
    update = subspaces.decompose(DRAW.normal(size=(20, rank)), DRAW.normal(size=(rank, 30)), 1.0)
    squares = []
    for _ in range(2000):
        left, right = (np.linalg.qr(DRAW.normal(size=(size, rank)))[0] for size in kernel.shape)
        squares.append(np.linalg.norm(left.T @ kernel @ right) ** 2)
    # a mean of 2000 draws, of which one deviates by about half of the mean: within 3 % or so
    assert subspaces.amplification(kernel, update, rank).through_random == pytest.approx(
        np.mean(squares) ** 0.5, rel=0.05
    )


def test_the_strongest_values_of_a_kernel():
    kernel = DRAW.normal(size=(60, 90))
    expected = np.linalg.svd(kernel, compute_uv=False)[:5]
    np.testing.assert_allclose(
        subspaces.strongest_values(kernel, 5), expected, rtol=0.05
    )  # a flat spectrum: the worst case
