"""What a bias means: how much of it is not chance, whether a change is, and how far a model is from its target.

Pure functions of class counts; see metrics.py for the bias itself.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

PERMUTATIONS = 2000


def gap_without_chance(counts: ArrayLike) -> float:
    """Root mean square, over prompts and pairs of classes, of the difference of the classes' probabilities.

    Of n images with class frequencies f, (f_i - f_j)² exceeds (p_i - p_j)² by (p_i + p_j - (p_i - p_j)²) / n on
    average, so (n (f_i - f_j)² - f_i - f_j) / (n - 1) estimates it without bias, whatever n. A perfectly fair model has
    0, up to noise that falls with the number of prompts, where the bias itself has its floor.

    Args:
        counts: images of each class, with shape (prompts, classes), integer; prompts with fewer than two images are
            left out.

    Returns:
        In [0, 1]; 0 where chance alone would give more; NaN if no prompt has two images.
    """
    table = np.asarray(counts, dtype=float)
    images = table.sum(1)
    table, images = table[images > 1], images[images > 1, None]
    if not len(table):
        return float("nan")
    first, second = np.triu_indices(table.shape[1], 1)
    shares = table / images
    square = (shares[:, first] - shares[:, second]) ** 2
    unbiased = (images * square - shares[:, first] - shares[:, second]) / (images - 1)
    return float(np.sqrt(max(unbiased.mean(), 0.0)))


def permutation_test(before: ArrayLike, after: ArrayLike, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """How often chance alone would change the mean bias as much as it changed from before to after, or more.

    Under the null hypothesis the images of a prompt are from one model: they are dealt to "before" and "after" at
    random. Images from the same noise resemble each other, which the test leaves aside: it is careful.

    Args:
        before: images of each class, with shape (prompts, classes), integer.
        after: likewise, of the same prompts; prompts without an image on either side are left out.
        permutations: how often images are dealt anew.
        seed: of the dealing.

    Returns:
        The two-sided p-value, at least 1 / (permutations + 1); NaN if there is no prompt.

    Raises:
        ValueError: if the shapes differ.
    """
    first, second = np.asarray(before), np.asarray(after)
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(
            f"both tables must have one shape (prompts, classes), but got {first.shape} and {second.shape}"
        )
    used = (first.sum(1) > 0) & (second.sum(1) > 0)
    first, second = first[used], second[used]
    if not len(first):
        return float("nan")
    random = np.random.default_rng(seed)
    change = np.zeros(permutations)
    for one, other in zip(first, second, strict=True):
        pooled = one + other
        dealt = random.multivariate_hypergeometric(pooled, other.sum(), size=permutations, method="marginals")
        change += bias(dealt) - bias(pooled - dealt)
    observed = bias(second).sum() - bias(first).sum()
    extreme = np.abs(change) >= abs(observed) - 1e-9
    return float((1 + extreme.sum()) / (1 + permutations))


def bias(counts: NDArray) -> NDArray:
    """Mean absolute difference of two classes' frequencies, over all pairs, with shape (...,) for counts (..., K)."""
    shares = counts / counts.sum(-1, keepdims=True)
    first, second = np.triu_indices(shares.shape[-1], 1)
    return np.abs(shares[..., first] - shares[..., second]).mean(-1)


def target_distance(counts: ArrayLike, target: ArrayLike) -> dict[str, float]:
    """How far the classes of some images are from a distribution.

    Args:
        counts: images of each class, with shape (classes,), integer.
        target: probability of each class, summing to one.

    Returns:
        `total_variation`, in [0, 1], the share of images that would have to change class; and
        `kullback_leibler`, KL(frequencies ‖ target) in nats, infinite where a class was seen that the target
        excludes. NaN without an image.
    """
    table, wanted = np.asarray(counts, dtype=float), np.asarray(target, dtype=float)
    if not table.sum():
        return {"total_variation": float("nan"), "kullback_leibler": float("nan")}
    shares = table / table.sum()
    seen = shares > 0
    with np.errstate(divide="ignore"):
        divergence = float((shares[seen] * np.log(shares[seen] / wanted[seen])).sum())
    return {"total_variation": float(np.abs(shares - wanted).sum() / 2), "kullback_leibler": divergence}
