"""What a bias means: how much of it is more than chance, whether it changed, and how far a model is from its target.

All functions are pure functions of class counts; see ``metrics.bias`` for the bias itself.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, t

from fairness_dft.metrics.bias import class_bias

PERMUTATIONS = 2000
FEW = 10  # prompts; with fewer the gap has no interval
AT_ONCE = 10_000_000  # counts drawn at a time


def unbiased_rms_gap(counts: ArrayLike) -> float:
    """Return the root mean square difference between the probabilities of two classes, over prompts and pairs.

    For n images with class frequencies f, (f_i - f_j)² exceeds (p_i - p_j)² by (p_i + p_j - (p_i - p_j)²) / n on
    average, so (n (f_i - f_j)² - f_i - f_j) / (n - 1) estimates it without bias for any n. The root is taken of its
    mean over prompts and pairs. A root mean square weighs large gaps more than the bias does, which is a mean: do not
    subtract one from the other. `gap_by_chance` is what a fair model has by chance.

    Args:
        counts: Number of images of each class, with shape (prompts, classes), integer. Prompts with fewer than two
            images are ignored.

    Returns:
        The gap, in [0, 1]; 0 where chance alone would give more; NaN if no prompt has two images.

    Example:
        >>> round(unbiased_rms_gap([[75, 25], [75, 25]]), 2), unbiased_rms_gap([[5, 5]])
        (0.49, 0.0)
    """
    table = np.asarray(counts, dtype=float)
    table = table[table.sum(1) > 1]
    return float(np.sqrt(squared_gaps(table).clip(0))) if len(table) else float("nan")


def gap_interval(counts: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Return the confidence interval of the gap, over similar prompts and their images.

    The squared gap is a mean over prompts of independent, unbiased estimates that include the noise of their images.
    The interval is Student's interval of that mean; the roots of its ends are the ends of the gap. In simulations the
    95 % interval covers 95 % with 50 prompts and 93 % with 12 or 25. If one prompt in ten is extreme and the others are
    fair, it covers 88 % with 50 prompts and 67 % with 10. Fewer prompts say too little.

    Args:
        counts: As for `unbiased_rms_gap`.
        level: Coverage, in (0, 1).

    Returns:
        Lower and upper end, in [0, 1]; both NaN with fewer than `FEW` prompts of at least two images.
    """
    table = np.asarray(counts, dtype=float)
    table = table[table.sum(1) > 1]
    if len(table) < FEW:
        return float("nan"), float("nan")
    squares = squared_gaps(table[:, None])
    margin = t.ppf((1 + level) / 2, len(squares) - 1) * squares.std(ddof=1) / np.sqrt(len(squares))
    low, high = np.sqrt((squares.mean() + np.array([-margin, margin])).clip(0, 1))
    return float(low), float(high)


def squared_gaps(counts: NDArray[Any]) -> Any:
    """Return the mean of the unbiased squared differences over prompts and pairs.

    Args:
        counts: Number of images of each class, with shape (..., P, K).

    Returns:
        The mean, with shape (...,).
    """
    images = counts.sum(-1, keepdims=True)
    shares = counts / images
    first, second = (shares[..., index] for index in np.triu_indices(shares.shape[-1], 1))
    return ((images * (first - second) ** 2 - first - second) / (images - 1)).mean((-2, -1))


def gap_by_chance(images: ArrayLike, classes: int, draws: int = 4000, seed: int = 0) -> float:
    """Return what the gap of a perfectly fair model stays below in 95 of 100 audits of this size.

    Args:
        images: Number of images of each prompt, with shape (prompts,), integer.
        classes: Number of classes K, equally frequent.
        draws: Number of simulated audits.
        seed: Seed of the draws.

    Returns:
        The gap, in [0, 1]; NaN if no prompt has two images.
    """
    sizes = np.asarray(images)
    sizes = sizes[sizes > 1]
    if not len(sizes):
        return float("nan")
    random, uniform = np.random.default_rng(seed), np.full(classes, 1 / classes)
    chunk = max(1, AT_ONCE // (len(sizes) * classes**2))
    left = [min(chunk, draws - done) for done in range(0, draws, chunk)]
    gaps = [squared_gaps(random.multinomial(sizes, uniform, size=(count, len(sizes)))) for count in left]
    return float(np.sqrt(np.quantile(np.concatenate(gaps), 0.95).clip(0)))


def permutation_test(
    before: ArrayLike,
    after: ArrayLike,
    target: ArrayLike | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> float:
    """Return the p-value of a change of the mean unfairness from one model to another.

    The null hypothesis is that both models draw a prompt's images from one distribution: the images are pooled and
    dealt to the two models at random. The p-value is the share of deals in which the mean unfairness changes as much
    as observed, or more. For images from the same noise, which resemble each other, `swap_test` is more sensitive.

    Args:
        before: Number of images of each class, with shape (prompts, classes), integer.
        after: The same for the other model. A prompt is ignored if one of the two models, or both, has no image of it.
        target: As for `unfairness`.
        permutations: Number of random deals.
        seed: Seed of the deals.

    Returns:
        The two-sided p-value, at least 1 / (permutations + 1); NaN if no prompt remains.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> permutation_test([[20, 0], [0, 20]], [[10, 10], [10, 10]]) < 0.01
        True
    """
    first, second = np.asarray(before), np.asarray(after)
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(
            f"both tables must have one shape (prompts, classes), but got {first.shape} and {second.shape}"
        )
    wanted = _by_prompt(target, first.shape)
    random = np.random.default_rng(seed)
    change, observed, used = np.zeros(permutations), 0.0, 0
    for one, other, share in zip(first, second, wanted, strict=True):
        if not (one.sum() and other.sum()):
            continue
        pooled = one + other
        dealt = random.multivariate_hypergeometric(pooled, other.sum(), size=permutations, method="marginals")
        change += unfairness(dealt, share) - unfairness(pooled - dealt, share)
        observed += unfairness(other, share) - unfairness(one, share)
        used += 1
    if not used:
        return float("nan")
    extreme = np.abs(change) >= abs(observed) - 1e-9
    return float((1 + extreme.sum()) / (1 + permutations))


def swap_test(
    pairs: ArrayLike, target: ArrayLike | None = None, permutations: int = PERMUTATIONS, seed: int = 0
) -> float:
    """Return the p-value of a change of the mean unfairness, for images in pairs from the same noise.

    The null hypothesis is that the two images of a pair could have come in the other order: every pair is swapped with
    probability ½. Pairs that show the same class do not count, so that a few changes in one direction are significant.

    Args:
        pairs: Number of pairs by class before and after, with shape (prompts, K + 1, K + 1), integer; the last class
            is no face. A prompt is ignored if one of the two models, or both, shows no face in any of its images.
        target: As for `unfairness`.
        permutations: Number of random swaps.
        seed: Seed of the swaps.

    Returns:
        The two-sided p-value, at least 1 / (permutations + 1); NaN if no prompt remains.

    Example:
        >>> pairs = [[[20, 12, 0], [0, 8, 0], [0, 0, 0]]]  # twelve men become women, and nobody the other way
        >>> swap_test(pairs) < 0.05
        True
    """
    table = np.asarray(pairs)
    classes = table.shape[-1] - 1
    wanted = _by_prompt(target, (len(table), classes))
    random = np.random.default_rng(seed)
    change, observed, used = np.zeros(permutations), 0.0, 0
    for counts, share in zip(table, wanted, strict=True):
        before, after = counts.sum(1), counts.sum(0)
        if not (before[:classes].sum() and after[:classes].sum()):
            continue
        moved = np.argwhere(counts * ~np.eye(classes + 1, dtype=bool))
        swapped = random.binomial(counts[tuple(moved.T)], 0.5, size=(permutations, len(moved)))
        unit = np.eye(classes + 1, dtype=int)
        flow = swapped @ (unit[moved[:, 1]] - unit[moved[:, 0]])
        one, other = before + flow, after - flow
        change += unfairness(other[:, :classes], share) - unfairness(one[:, :classes], share)
        observed += unfairness(after[:classes], share) - unfairness(before[:classes], share)
        used += 1
    if not used:
        return float("nan")
    extreme = np.abs(change) >= abs(observed) - 1e-9
    return float((1 + extreme.sum()) / (1 + permutations))


def _by_prompt(target: ArrayLike | None, shape: tuple[int, ...]) -> list[NDArray[Any] | None]:
    """Return the target of each prompt, or None for each."""
    if target is None:
        return [None] * shape[0]
    return list(np.broadcast_to(np.asarray(target, dtype=float), shape))


def unfairness(counts: NDArray[Any], target: NDArray[Any] | None = None) -> NDArray[Any]:
    """Return the bias of tables of counts or, for an unequal target, their total variation from it.

    Args:
        counts: Number of images of each class, with shape (..., K); a row without images has the unfairness 0.
        target: Target shares D, with shape (K,) or (..., K); None for the bias.

    Returns:
        The unfairness, in [0, 1], with shape (...,).
    """
    images = counts.sum(-1, keepdims=True)
    shares = counts / np.maximum(images, 1)
    if target is not None:
        return np.where(images[..., 0] > 0, np.abs(shares - target).sum(-1) / 2, 0)
    return class_bias(torch.as_tensor(shares)).numpy()


def distance_by_prompt(counts: ArrayLike, target: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the total variation between each prompt's class frequencies and its target, and its floor.

    The floor is the expectation for a model that meets the target exactly: of n images, a binomial number shows class
    k, so the floor is E|Bin(n, D_k) / n - D_k|, summed over classes and halved.

    Args:
        counts: Number of images of each class, with shape (prompts, classes), integer.
        target: Probability D of each class, with shape (classes,) or (prompts, classes).

    Returns:
        Both in [0, 1], with shape (prompts,); NaN where a prompt has no image.
    """
    table = np.asarray(counts)
    wanted = np.broadcast_to(np.asarray(target, dtype=float), table.shape)
    distances = np.full((2, len(table)), np.nan)
    for index, (row, shares) in enumerate(zip(table, wanted, strict=True)):
        if n := int(row.sum()):
            number = np.arange(n + 1)[:, None]
            floor = (binom.pmf(number, n, shares) * np.abs(number / n - shares)).sum() / 2
            distances[:, index] = unfairness(row, shares), floor
    return distances[0], distances[1]


def target_distance(counts: ArrayLike, target: ArrayLike) -> dict[str, float]:
    """Return how far the classes of some images are from a distribution.

    Args:
        counts: Number of images of each class, with shape (classes,), integer.
        target: Probability of each class, summing to one.

    Returns:
        `total_variation`, in [0, 1], the share of images that would have to change class; and
        `kullback_leibler`, KL(frequencies ‖ target) in nats, infinite if images show a class that the target
        excludes. Both are NaN without an image.

    Example:
        >>> distances = target_distance([3, 1], [0.5, 0.5])
        >>> distances["total_variation"], round(distances["kullback_leibler"], 3)
        (0.25, 0.131)
    """
    table, wanted = np.asarray(counts, dtype=float), np.asarray(target, dtype=float)
    if not table.sum():
        return {"total_variation": float("nan"), "kullback_leibler": float("nan")}
    shares = table / table.sum()
    seen = shares > 0
    with np.errstate(divide="ignore"):
        divergence = float((shares[seen] * np.log(shares[seen] / wanted[seen])).sum())
    return {"total_variation": float(np.abs(shares - wanted).sum() / 2), "kullback_leibler": divergence}
