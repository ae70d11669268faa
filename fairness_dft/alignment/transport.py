"""Distributional alignment targets by optimal transport.

    q_i = E_u[u_σ*(i)],  where  σ* = argmin_σ Σ_i ‖p_i − u_σ(i)‖₂  and  u_1, ..., u_n ~ D
    y_i = argmax_k q_ik,  c_i = max_k q_ik

p_i are ``probabilities``, the classifier's output on the n images that show a face; D is ``target``, the
class distribution that the n images should follow; the draws u are one-hot vectors of K classes. ``Targets``
holds q (``probabilities``), y (``classes``) and c (``confidence``).

A draw enters only through its class counts m ~ Multinomial(n, D), so the expectation runs over count vectors,
of which there are C(n+K−1, K−1). Classes that D excludes are removed first. If two are left, q is a Binomial
tail; if the count vectors are few, all are solved and weighted by their probability; if they are many, some are drawn,
by a low-discrepancy sequence, which comes as close as two to four times as many independent draws.

Several attributes a = 1, ..., A are aligned jointly: D is over the product of their classes, the cost of an
image and a draw is (Σ_a ‖p_i^a − u^a‖₂²)^½, and q_i, marginalised, gives each attribute its y_i^a and c_i^a.

Reference:
    Finetuning Text-to-Image Diffusion Models for Fairness (Shen et al., 2024), section 4.1,
    https://arxiv.org/abs/2311.07604
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom, multinomial
from torch import Tensor

from fairness_dft.alignment.assignment import optimal_assignments
from fairness_dft.alignment.counts import draw_counts, enumerate_counts
from fairness_dft.attributes import marginal


@dataclass(frozen=True)
class Targets:
    """What the images of one prompt should become.

    Args:
        probabilities: the expected target q of each image, with shape (n, K), rows sum to one.
        classes: the dynamic target y, the most probable class of q, with shape (n,), int64 in [0, K).
        confidence: the probability c of that class, with shape (n,), in [1/K, 1].
    """

    probabilities: Tensor
    classes: Tensor
    confidence: Tensor

    def decided(self, confidence: float) -> Tensor:
        """Which targets are confident enough, c ≥ C, and no draw between classes, of which the first would win.

        With two classes and an odd number of images the one in the middle is such a draw, at c = 1/2.

        Args:
            confidence: the least confidence C, in [0, 1].

        Returns:
            bool, with shape (n,).
        """
        alike = (self.probabilities > self.confidence[:, None] - 1e-6).sum(dim=1)
        return (self.confidence >= confidence) & (alike == 1)


def expected_targets(
    probabilities: Tensor,
    target: Tensor | Sequence[float],
    draws: int = 256,
    max_enumeration: int = 1_000,
    generator: torch.Generator | None = None,
) -> Targets:
    """Assign every image the class that brings the images as a set to the target distribution.

    Exact for two classes and where at most ``max_enumeration`` count vectors exist; only beyond do ``draws`` and
    ``generator`` matter, and ranks that must agree need generators in the same state.

    Args:
        probabilities: the classifier's probabilities p of the images with a face, with shape (n, K), in
            [0, 1].
        target: the target distribution D over the classes, with shape (K,), non-negative, sums to one.
        draws: how many times the classes of all images are drawn when enumeration is too long; a power of two covers
            the distribution most evenly.
        max_enumeration: the largest number of count vectors that are all solved. The default covers 3 classes up to 43
            images, and 4 classes up to 16.
        generator: a random generator on the CPU, for the draws.

    Returns:
        Targets on the device and in the dtype of ``probabilities``; empty for n = 0.

    Example:
        >>> expected_targets(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]), [0.5, 0.5]).classes
        tensor([0, 0, 1, 1])

    Raises:
        ValueError: if an argument is not as described.
    """
    return expected_joint_targets([probabilities], target, draws, max_enumeration, generator)[0]


def expected_joint_targets(
    probabilities: Sequence[Tensor],
    target: Tensor | Sequence[float],
    draws: int = 256,
    max_enumeration: int = 1_000,
    generator: torch.Generator | None = None,
    rescale_cost: bool = False,
) -> list[Targets]:
    """Assign every image one class of each attribute, so that the images as a set have the joint distribution.

    Args:
        probabilities: the classifier's probabilities p^a of each attribute, with shapes (n, K_a), in [0, 1].
        target: the joint target distribution D, with shape (K_1, ..., K_A), non-negative, sums to one.
        draws: as in `expected_targets`.
        max_enumeration: as in `expected_targets`; there are C(n+K−1, K−1) assignments of K = K_1 ⋯ K_A classes.
        generator: as in `expected_targets`.
        rescale_cost: whether the cost sees `relative_to_target` in place of the probabilities.

    Returns:
        Targets of each attribute.

    Example:
        >>> gender, age = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])
        >>> [targets.classes.tolist() for targets in expected_joint_targets([gender, age], torch.full((2, 2), 0.25))]
        [[0, 1], [0, 1]]

    Raises:
        ValueError: if an argument is not as described.
    """
    distribution = _checked_target(target, len(probabilities))
    for values, classes in zip(probabilities, distribution.shape, strict=True):
        _check_probabilities(values, classes)
    if draws < 1 or max_enumeration < 0:
        raise ValueError(
            "`draws` must be at least 1 and `max_enumeration` at least 0, "
            f"but got draws={draws}, max_enumeration={max_enumeration}"
        )
    seen = [values.detach().cpu().double().numpy() for values in probabilities]
    if rescale_cost:
        seen = [relative_to_target(values, marginal(distribution, a)) for a, values in enumerate(seen)]
    cost = transport_cost(*seen)
    expected = expected_assignment(cost, distribution.ravel(), draws, max_enumeration, generator)
    expected = expected.reshape(len(cost), *distribution.shape)
    return [_targets(marginal(expected, 0, a + 1), values) for a, values in enumerate(probabilities)]


def _targets(expected: np.ndarray, like: Tensor) -> Targets:
    probabilities = torch.from_numpy(expected)
    confidence, classes = probabilities.max(dim=1)
    return Targets(probabilities.to(like), classes.to(like.device), confidence.to(like))


def transport_cost(*probabilities: np.ndarray) -> np.ndarray:
    """Distance of each image to each class, ‖p_i − e_k‖₂, over all attributes.

    Args:
        probabilities: the probabilities p^a of each attribute, with shapes (n, K_a).

    Returns:
        The cost of giving class k to image i, with shape (n, K), K = K_1 ⋯ K_A in the order of a flattened
        (K_1, ..., K_A), in [0, √(2A)].
    """
    images = len(probabilities[0])
    squares = np.zeros((images, 1))
    for values in probabilities:
        distances = np.square(values[:, None] - np.eye(values.shape[1])).sum(axis=-1)
        squares = (squares[:, :, None] + distances[:, None, :]).reshape(images, squares.shape[1] * values.shape[1])
    return np.sqrt(squares)


def relative_to_target(probabilities: np.ndarray, distribution: np.ndarray) -> np.ndarray:
    """Probabilities as they would be had the classes been equally likely instead of as the target has them.

    p_k / D_k, normalized: what is as likely as its share in the target becomes as likely as every other class.
    Without it, where the target is 75 % young, an image that is old with probability 0.3 counts as clearly
    young, although that is more than the target's share. A uniform target changes nothing.

    Args:
        probabilities: the probabilities p, with shape (n, K).
        distribution: the target shares D of these classes, with shape (K,).

    Returns:
        The relative probabilities, with shape (n, K), rows sum to one; 0 for a class that D excludes.
    """
    wanted = distribution > 0
    relative = np.where(wanted, (probabilities + 1e-12) / np.where(wanted, distribution, 1), 0)
    normalized: np.ndarray = relative / relative.sum(axis=1, keepdims=True)
    return normalized


def expected_assignment(
    cost: np.ndarray,
    distribution: np.ndarray,
    draws: int = 256,
    max_enumeration: int = 1_000,
    generator: torch.Generator | None = None,
) -> np.ndarray:
    """Compute the expected one-hot assignment q of least cost, for any cost.

    Args:
        cost: the cost of giving class k to image i, with shape (n, K).
        distribution: the target distribution D, with shape (K,), sums to one.
        draws: how many draws to average; see ``expected_targets``.
        max_enumeration: the largest number of count vectors that are all solved.
        generator: a random generator on the CPU.

    Returns:
        The expected assignment q, with shape (n, K), rows sum to one.
    """
    images = len(cost)
    support = distribution > 0
    shares, classes = distribution[support], int(support.sum())
    expected = np.zeros_like(cost)
    if classes == 2:
        expected[:, support] = binomial_assignment(cost[:, support], shares[1])
    elif math.comb(images + classes - 1, classes - 1) <= max_enumeration:
        counts = enumerate_counts(images, classes)
        expected[:, support] = mean_assignment(cost[:, support], counts, multinomial.pmf(counts, images, shares))
    else:
        counts, weights = draw_counts(images, shares, draws, generator)
        expected[:, support] = mean_assignment(cost[:, support], counts, weights)
    return expected


def binomial_assignment(cost: np.ndarray, share: float) -> np.ndarray:
    """Compute the expected assignment for two classes, in closed form.

    If m images get class 1, the total cost is Σ_i cost_i0 plus Σ (cost_i1 − cost_i0) over those m images, so
    they are the m with the smallest differences. For p = (1 − s, s) the difference is √2 (1 − 2s), so these
    are the m images with the largest probability s of class 1. The image of rank r = 0, 1, ... in that order
    thus has class 1 in exactly the draws with m > r, and m ~ Binomial(n, D_1), so q_i1 = P(m > r).

    Images with equal differences are ranked in the order given. They must not share a rank: images on which
    the classifier saturates at the same value would all get q = D and never a confident target.

    Args:
        cost: the cost of either class, with shape (n, 2).
        share: the target probability of class 1, D_1.

    Returns:
        The expected assignment q, with shape (n, 2).
    """
    images = len(cost)
    order = np.argsort(cost[:, 1] - cost[:, 0], kind="stable")
    expected = np.empty((images, 2))
    expected[order, 1] = binom.sf(np.arange(images), images, share)
    expected[order, 0] = binom.cdf(np.arange(images), images, share)
    return expected


def mean_assignment(cost: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of the optimal assignments of several count vectors.

    Args:
        cost: the cost of giving class k to image i, with shape (n, K).
        counts: how many images get each class, with shape (M, K), rows sum to n.
        weights: the weight of each count vector, with shape (M,).

    Returns:
        The mean one-hot assignment, with shape (n, K), rows sum to one.
    """
    assigned = optimal_assignments(cost, counts)
    weights = weights / weights.sum()
    return np.stack([weights @ (assigned == label) for label in range(cost.shape[1])], axis=1)


def _checked_target(target: Tensor | Sequence[float], attributes: int) -> np.ndarray:
    """Return the target distribution D in float64, normalized, with one axis for each attribute."""
    distribution = torch.as_tensor(target, dtype=torch.float64).detach().cpu().numpy()
    valid = distribution.ndim == attributes and bool((distribution >= 0).all()) and abs(distribution.sum() - 1) < 1e-5
    if not valid:
        raise ValueError(
            "`target` must be one non-negative probability per class and sum to one, "
            f"but got {distribution.tolist()} with sum {distribution.sum():g}"
        )
    normalized: np.ndarray = distribution / distribution.sum()
    return normalized


def _check_probabilities(probabilities: Tensor, classes: int) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] != classes or not probabilities.is_floating_point():
        raise ValueError(
            f"`probabilities` must be floating point with shape (n, {classes}), one column per class of "
            f"`target`, but got {probabilities.dtype} with shape {tuple(probabilities.shape)}"
        )
    # Sums of half-precision probabilities may leave [0, 1] by rounding; NaN fails either comparison.
    valid = ((probabilities > -1e-2) & (probabilities < 1 + 1e-2)).all(dim=1)
    if not valid.all():
        row = int(valid.int().argmin())
        raise ValueError(
            f"`probabilities` must lie in [0, 1] without NaN, but row {row} is {probabilities[row].tolist()}"
        )
