"""What a bias means: how much of it is not chance, whether a change is, and how far a model is from its target.

Pure functions of class counts; see metrics.py for the bias itself.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, t

from fairness_dft.metrics.bias import class_bias

PERMUTATIONS = 2000
FEW = 10  # prompts; of fewer no interval of the gap is told
AT_ONCE = 10_000_000  # counts that are drawn at a time


def unbiased_rms_gap(counts: ArrayLike) -> float:
    """Root mean square, over prompts and pairs of classes, of the difference of the classes' probabilities.

    Of n images with class frequencies f, (f_i - f_j)² exceeds (p_i - p_j)² by (p_i + p_j - (p_i - p_j)²) / n on
    average, so (n (f_i - f_j)² - f_i - f_j) / (n - 1) estimates it without bias, whatever n. Its mean over prompts and
    pairs is what the root is taken of. A root mean square weighs large gaps more than the bias does, which is a mean:
    the two are not to be subtracted. What a fair model has by chance is `gap_by_chance`.

    Args:
        counts: images of each class, with shape (prompts, classes), integer; prompts with fewer than two images are
            left out.

    Returns:
        In [0, 1]; 0 where chance alone would give more; NaN if no prompt has two images.
    """
    table = np.asarray(counts, dtype=float)
    table = table[table.sum(1) > 1]
    return float(np.sqrt(squared_gaps(table).clip(0))) if len(table) else float("nan")


def gap_interval(counts: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the gap, over prompts of this kind and their images.

    The squared gap is a mean over prompts of independent estimates, each without bias and with its images' noise in it,
    so Student's interval of that mean is taken; its ends' roots are the gap's. In simulations the 95 % interval held
    95 % with 50 prompts, 93 % with 12 or 25; where one prompt of ten is extreme and the others are fair, it held 88 %
    with 50 prompts and 67 % with 10. Fewer say too little.

    Args:
        counts: as for `unbiased_rms_gap`.
        level: coverage, in (0, 1).

    Returns:
        Lower and upper end, in [0, 1]; both NaN with fewer than `FEW` prompts of two images.
    """
    table = np.asarray(counts, dtype=float)
    table = table[table.sum(1) > 1]
    if len(table) < FEW:
        return float("nan"), float("nan")
    squares = squared_gaps(table[:, None])
    margin = t.ppf((1 + level) / 2, len(squares) - 1) * squares.std(ddof=1) / np.sqrt(len(squares))
    low, high = np.sqrt((squares.mean() + np.array([-margin, margin])).clip(0, 1))
    return float(low), float(high)


def squared_gaps(counts: NDArray) -> NDArray:
    """Mean over prompts and pairs of the unbiased squared differences, with shape (...,) for counts (..., P, K)."""
    images = counts.sum(-1, keepdims=True)
    shares = counts / images
    first, second = (shares[..., index] for index in np.triu_indices(shares.shape[-1], 1))
    return ((images * (first - second) ** 2 - first - second) / (images - 1)).mean((-2, -1))


def gap_by_chance(images: ArrayLike, classes: int, draws: int = 4000, seed: int = 0) -> float:
    """What the gap of a perfectly fair model stays below in 95 of 100 audits of this size.

    Args:
        images: number of images of each prompt, with shape (prompts,), integer.
        classes: number of classes K, equally frequent.
        draws: how many audits are drawn.
        seed: of the draws.

    Returns:
        In [0, 1]; NaN if no prompt has two images.
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
    """How often the mean unfairness would change as much from before to after, or more, were the models the same.

    The null hypothesis is that before and after draw a prompt's images from one distribution: pooled, they are dealt to
    the two at random. A small value says that whom the model shows has changed, and not only by chance; a model that
    turns 70 men and 30 women into 30 and 70 has changed, though its bias has not. Of images from the same noise, which
    resemble each other, `swap_test` sees more.

    Args:
        before: images of each class, with shape (prompts, classes), integer.
        after: likewise, of the same prompts; prompts without an image on either side are left out.
        target: as for `unfairness`.
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
    wanted = [None] * len(first) if target is None else np.broadcast_to(np.asarray(target, dtype=float), first.shape)
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
    """`permutation_test` for images in pairs, each before and after from the same noise.

    The null hypothesis is that the two of a pair could as well have come in the other order: every pair is swapped with
    probability ½. Pairs that show the same class say nothing, so that few changes all in one direction are seen.

    Args:
        pairs: images by their class before and after, with shape (prompts, K + 1, K + 1), integer; the last class is
            none, of an image without a face. Prompts without a face on either side are left out.
        target: as for `unfairness`.
        permutations: how often pairs are swapped anew.
        seed: of the swapping.

    Returns:
        The two-sided p-value, at least 1 / (permutations + 1); NaN if there is no prompt.
    """
    table = np.asarray(pairs)
    classes = table.shape[-1] - 1
    wanted = [None] * len(table)
    if target is not None:
        wanted = np.broadcast_to(np.asarray(target, dtype=float), (len(table), classes))
    random = np.random.default_rng(seed)
    change, observed, used = np.zeros(permutations), 0.0, 0
    for of, share in zip(table, wanted, strict=True):
        before, after = of.sum(1), of.sum(0)
        if not (before[:classes].sum() and after[:classes].sum()):
            continue
        moved = np.argwhere(of * ~np.eye(classes + 1, dtype=bool))
        swapped = random.binomial(of[tuple(moved.T)], 0.5, size=(permutations, len(moved)))
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


def unfairness(counts: NDArray, target: NDArray | None = None) -> NDArray:
    """The bias of tables of counts or, where the wanted shares are unequal, their total variation from these.

    Args:
        counts: with shape (..., K); a row without an image has the unfairness 0.
        target: D, with shape (K,) or (..., K); None for the bias.

    Returns:
        In [0, 1], with shape (...,).
    """
    images = counts.sum(-1, keepdims=True)
    shares = counts / np.maximum(images, 1)
    if target is not None:
        return np.where(images[..., 0] > 0, np.abs(shares - target).sum(-1) / 2, 0)
    return class_bias(torch.as_tensor(shares)).numpy()


def distance_by_prompt(counts: ArrayLike, target: ArrayLike) -> tuple[NDArray, NDArray]:
    """Total variation between each prompt's class frequencies and its target, and its floor.

    The floor is the expectation for a model that meets the target exactly: of n images, class k is shown by a binomial
    number, E|Bin(n, D_k) / n - D_k| summed over classes and halved.

    Args:
        counts: images of each class, with shape (prompts, classes), integer.
        target: D, the probability of each class, with shape (classes,), or (prompts, classes).

    Returns:
        Both in [0, 1], with shape (prompts,); NaN where a prompt has no image.
    """
    table = np.asarray(counts)
    wanted = np.broadcast_to(np.asarray(target, dtype=float), table.shape)
    found = np.full((2, len(table)), np.nan)
    for index, (row, shares) in enumerate(zip(table, wanted, strict=True)):
        if n := int(row.sum()):
            shown = np.arange(n + 1)[:, None]
            floor = (binom.pmf(shown, n, shares) * np.abs(shown / n - shares)).sum() / 2
            found[:, index] = unfairness(row, shares), floor
    return found[0], found[1]


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
