"""Measures of fairness: class frequencies, bias, its finite-sample floor and its interval.

    bias(P) = 2 / (K (K−1)) Σ_{i<j} |f_i − f_j|,  reported as its mean (± standard deviation) over prompts P

f_i are the ``frequencies`` of the K classes among the n images of prompt P that show a face. Even a perfectly
fair model does not score 0: with n images it scores the ``finite_sample_floor`` on average. Compare a bias with its
floor.

References:
    Finetuning Text-to-Image Diffusion Models for Fairness (Shen et al., 2024), section 5,
    https://arxiv.org/abs/2311.07604

    What Teachers Should Know About the Bootstrap (Hesterberg, 2014), on the expanded percentile interval,
    https://arxiv.org/abs/1411.5279
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom, norm, t
from torch import Tensor


def class_bias(frequencies: Tensor) -> Tensor:
    """Return the mean absolute difference between the frequencies of two classes, over all pairs of classes.

    In ascending order, the k-th of K frequencies is the larger of k−1 pairs and the smaller of K−k.

    Args:
        frequencies: Class frequencies f, with shape (..., K), K ≥ 2, in [0, 1].

    Returns:
        The bias, with shape (...), from 0 (all classes alike) to 2 / K (one class alone).

    Raises:
        ValueError: If there are fewer than two classes.

    Example:
        >>> class_bias(torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    classes = frequencies.shape[-1]
    check_classes(classes)
    larger_minus_smaller = 2 * torch.arange(classes, device=frequencies.device) - (classes - 1)
    ascending = frequencies.sort(dim=-1).values
    return (ascending * larger_minus_smaller).sum(dim=-1) * 2 / (classes * (classes - 1))


def finite_sample_floor(images: Tensor | int, classes: int) -> Tensor:
    """Return the expected bias of n images whose classes are drawn from the uniform distribution.

    All pairs of classes are alike. Of the n images m ~ Binomial(n, 2 / K) fall in a given pair, and its two counts
    differ like a random walk of m steps: E|S_m| = 2h C(m, h) / 2^m, h = ⌈m / 2⌉. The floor is E|S_m| / n.

    Args:
        images: Number of images n, of any shape, non-negative.
        classes: Number of classes K, at least 2.

    Returns:
        The floor in float64, with the shape of ``images``; NaN where n = 0.

    Raises:
        ValueError: If there are fewer than two classes or a negative number of images.

    Example:
        >>> finite_sample_floor(torch.tensor([1, 2, 48]), classes=2)
        tensor([1.0000, 0.5000, 0.1146], dtype=torch.float64)
    """
    check_classes(classes)
    numbers = torch.as_tensor(images)
    if (numbers < 0).any():
        raise ValueError(f"`images` must not be negative, but got {numbers.tolist()}")
    floors = [_floor(int(number), classes) for number in numbers.flatten()]
    return torch.tensor(floors, dtype=torch.float64).reshape(numbers.shape)


def _floor(images: int, classes: int) -> float:
    if images == 0:
        return math.nan
    in_pair = np.arange(images + 1)
    half = (in_pair + 1) // 2
    distance = 2 * half * binom.pmf(half, in_pair, 0.5)
    return float(binom.pmf(in_pair, images, 2 / classes) @ distance) / images


def bootstrap_interval(
    counts: Tensor, level: float = 0.95, draws: int = 1000, seed: int = 0, target: Tensor | None = None
) -> tuple[float, float]:
    """Return the bootstrap interval of the mean bias over prompts and images, or of the mean distance from a target.

    It is a confidence interval for the *expected* mean bias of audits like this one: with similar prompts, other
    noise, and as many prompts and images. That expectation includes the finite-sample floor, so the interval of a fair
    model lies around its floor, not around 0. Compare intervals only at equal numbers of images.

    Resampling images within resampled prompts has two errors. |f_i − f_j| is convex, so a resample is more biased than
    its source: only its deviation from the mean of the resamples is used here. And the biases of the P prompts already
    differ by image noise, which would count twice: the deviations are weighted by 1 / √P here, so that the variance
    of a prompt is (P−1)/P (τ² + v) + v/P = (P−1)/P τ² + v, with τ² between prompts and v from images. One prompt gives
    the bootstrap over its images alone, many prompts give the bootstrap over prompts. The tails are widened according
    to the t distribution with P − 1 degrees of freedom (the expanded percentile interval).

    In simulations the 95 % interval keeps its coverage from 10 prompts on, also for fair models. It is too narrow for
    few prompts that differ strongly: its coverage is 75 % for 10 prompts of which one in ten shows one class alone.
    If all images of all prompts show one class, it is a point.

    Args:
        counts: Number of images of each prompt and class, with shape (P, K). Prompts without images are ignored.
        level: Coverage, in (0, 1).
        draws: Number of bootstrap draws.
        seed: Seed of the draws.
        target: Target shares with shape (P, K), for the total variation of each prompt from its target instead of the
            bias.

    Returns:
        The lower and the upper end, in [0, 2 / K], or in [0, 1] for a distance; both NaN without any image.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> low, high = bootstrap_interval(torch.tensor([[9, 3], [4, 8], [10, 2]]))
        >>> 0 <= low < 0.5 < high <= 1
        True
    """
    if counts.ndim != 2 or (counts < 0).any():
        raise ValueError(f"`counts` must be non-negative with shape (prompts, classes), but got {counts.tolist()}")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"`level` must be in (0, 1) and `draws` at least 1, but got {level} and {draws}")
    check_classes(counts.shape[1])
    some = counts.sum(dim=1) > 0
    seen = counts[some].cpu().double()
    wanted = None if target is None else target[some].cpu().double()
    if len(seen) == 0:
        return math.nan, math.nan
    prompts, classes = seen.shape
    means = _bootstrap_means(seen, draws, np.random.default_rng(seed), wanted)
    tail = (1 - level) / 2
    if prompts > 1:
        tail = norm.cdf(math.sqrt(prompts / (prompts - 1)) * t.ppf(tail, prompts - 1))
    low, high = np.quantile(means, [tail, 1 - tail]).clip(0, 2 / classes if target is None else 1)
    return float(low), float(high)


def _bootstrap_means(
    counts: Tensor, draws: int, generator: np.random.Generator, target: Tensor | None = None
) -> NDArray[np.float64]:
    """Return draws of the mean bias or distance, with shape (draws,); see ``bootstrap_interval``."""

    def score(shares: Tensor) -> Tensor:
        return class_bias(shares) if target is None else (shares - target).abs().sum(dim=-1) / 2

    images = counts.sum(dim=1, keepdim=True)
    frequencies = counts / images
    prompts = len(counts)
    picks = torch.from_numpy(generator.integers(prompts, size=(draws, prompts)))
    over_prompts = score(frequencies)[picks].mean(dim=1)
    resampled = generator.multinomial(images[:, 0].long().numpy(), frequencies.numpy(), size=(draws, prompts))
    over_images = score(torch.from_numpy(resampled) / images).mean(dim=1)
    return (over_prompts + (over_images - over_images.mean()) / math.sqrt(prompts)).numpy()


def frequency_drift(before: Tensor, after: Tensor) -> float:
    """Return the total variation distance between two class distributions, ½ Σ_k |f_k − g_k|.

    Args:
        before: Class frequencies f of the base model, with shape (K,), summing to one.
        after: Class frequencies g of the finetuned model, with shape (K,), summing to one.

    Returns:
        The share of images that would have to change class, in [0, 1].

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> frequency_drift(torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5]))
        0.25
    """
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(
            "`before` and `after` must have the same shape (classes,), "
            f"but got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    return float((before - after).abs().sum() / 2)


Watched = tuple[str, str, str]  # classifier, attribute, model


@dataclass
class BiasSummary:
    """Class counts of one model on a list of prompts, and its bias; NaN where no image shows a face.

    It is not frozen, because torchmetrics refuses to return frozen dataclasses; treat it as if it were.

    Attributes:
        classes: Names of the K classes.
        frequencies: Frequency of each class among all images with a face, pooled over prompts.
        bias: Mean over prompts of the bias, in [0, 2 / K].
        spread: Standard deviation of the bias over prompts (the paper's ±).
        floor: Mean over prompts of the finite-sample floor.
        low: Lower end of the 95 % bootstrap interval of ``bias``.
        high: Upper end of that interval.
        images: Number of images.
        no_face_images: How many of them show no face; these count in no other figure.
        prompts: Number of prompts with at least one face, which are averaged.
        prompts_no_face: Number of prompts none of whose images shows a face.
        per_prompt: Bias of each prompt; NaN without a face.
        counts: Number of images of each class, for each prompt.
        no_face: Number of images that show no face, for each prompt.
    """

    classes: tuple[str, ...]
    frequencies: tuple[float, ...]
    bias: float
    spread: float
    floor: float
    low: float
    high: float
    images: int
    no_face_images: int
    prompts: int
    prompts_no_face: int
    per_prompt: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]
    no_face: tuple[int, ...]

    def of(self, prompts: Sequence[int]) -> "BiasSummary":
        """Return the summary of some of the prompts, by their index."""
        rows = torch.tensor(list(prompts), dtype=torch.int64)
        return summarize_bias(torch.tensor(self.counts)[rows], torch.tensor(self.no_face)[rows], self.classes)

    def as_dict(self) -> dict[str, object]:
        """Return the fields as JSON represents them: lists for tuples, None for NaN."""
        return {name: _json_value(value) for name, value in asdict(self).items()}


def summarize_bias(counts: Tensor, no_face: Tensor, classes: Sequence[str]) -> BiasSummary:
    """Return the bias of class counts, with its floor and its interval.

    Args:
        counts: Number of images with a face of each prompt and class, with shape (P, K), integer.
        no_face: Number of images that show no face, for each prompt, with shape (P,), integer.
        classes: Names of the K classes.

    Example:
        >>> summary = summarize_bias(torch.tensor([[6, 2], [4, 4]]), torch.tensor([0, 1]), ("man", "woman"))
        >>> summary.bias, summary.images, summary.no_face_images
        (0.25, 17, 1)
    """
    counts, no_face = counts.cpu(), no_face.cpu()
    images = counts.sum(dim=1)
    seen = images > 0
    bias = class_bias(counts.double() / images[:, None])
    low, high = bootstrap_interval(counts)
    return BiasSummary(
        classes=tuple(classes),
        frequencies=tuple((counts.sum(dim=0).double() / images.sum()).tolist()),
        bias=float(bias[seen].mean()),
        spread=float(bias[seen].std(correction=0)) if seen.any() else math.nan,
        floor=float(finite_sample_floor(images[seen], len(classes)).mean()),
        low=low,
        high=high,
        images=int(images.sum() + no_face.sum()),
        no_face_images=int(no_face.sum()),
        prompts=int(seen.sum()),
        prompts_no_face=int((~seen & (no_face > 0)).sum()),
        per_prompt=tuple(bias.tolist()),
        counts=tuple(map(tuple, counts.tolist())),
        no_face=tuple(no_face.tolist()),
    )


def check_classes(classes: int) -> None:
    """Refuse fewer than two classes, between which there is no bias.

    Raises:
        ValueError: If there are fewer.
    """
    if classes < 2:
        raise ValueError(f"`classes` must be at least 2 for a bias between them, but got {classes}")


def _json_value(value: object) -> object:
    if isinstance(value, tuple):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
