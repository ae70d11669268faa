"""The class counts of a draw from the target distribution: all of them, a sample, or a binomial tail."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from scipy.stats import binom, qmc


def enumerate_counts(images: int, classes: int) -> np.ndarray:
    """All ways to share n images among K classes ("stars and bars").

    Args:
        images: the number of images n.
        classes: the number of classes K.

    Returns:
        All count vectors, with shape (C(n+K−1, K−1), K), int64, rows sum to n.
    """
    slots = images + classes - 1
    bars = np.array(list(combinations(range(slots), classes - 1)), dtype=np.int64)
    return np.diff(bars, axis=1, prepend=-1, append=slots) - 1


def draw_counts(
    images: int, distribution: np.ndarray, draws: int, generator: torch.Generator | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Class counts of random draws u_1, ..., u_n ~ D that together cover the distribution of counts evenly.

    Given the counts of the classes before it, the count of class k is binomial, m_k ~ Binomial(n − Σ_j<k m_j, D_k /
    Σ_j≥k D_j). The inverses of these K − 1 distribution functions take a point of the unit cube to a count vector, and
    the points are those of a scrambled Sobol sequence: each is uniform, so the mean over the draws is right on average,
    and together they leave no gaps.

    Args:
        images: the number of images n, at least 1.
        distribution: the target distribution D, with shape (K,), positive, K at least 2.
        draws: the number of draws.
        generator: a random generator on the CPU.

    Returns:
        The distinct count vectors drawn, with shape (M, K), and how often each was, with shape (M,).

    Reference:
        On the L2-discrepancy for anchored boxes (Matoušek, 1998), whose scrambling scipy's is,
        https://doi.org/10.1006/jcom.1998.0489
    """
    classes = len(distribution)
    seed = int(torch.randint(2**31, (), generator=generator))
    points = qmc.Sobol(classes - 1, seed=seed).random_base2((draws - 1).bit_length())[:draws]
    left, counts = np.full(len(points), images), []
    remaining = 1 - np.concatenate([[0], distribution.cumsum()[:-1]])
    for point, share, rest in zip(points.T, distribution[:-1], remaining[:-1], strict=True):
        below = binomial_table(images, min(float(share / rest), 1.0))[left] < point[:, None]
        counts.append(below.sum(axis=1))
        left = left - counts[-1]
    return np.unique(np.stack([*counts, left], axis=1), axis=0, return_counts=True)


@lru_cache(maxsize=256)
def binomial_table(images: int, share: float) -> np.ndarray:
    """P(m ≤ j) of m ~ Binomial(i, share), for i and j from 0 to n, with shape (n + 1, n + 1); not to be changed."""
    every = np.arange(images + 1)
    table: np.ndarray = binom.cdf(every, every[:, None], share)
    return table
