"""Measures of fairness: class frequencies, bias, its finite-sample floor and its interval.

    bias(P) = 2 / (K (K−1)) Σ_{i<j} |f_i − f_j|,  reported as its mean (± standard deviation) over prompts P

f_i are the ``frequencies`` of the K classes among the n images of prompt P that show a face. Even a perfectly
fair model does not score 0: with n images it scores the ``finite_sample_floor``, and a bias is read against
it. How much of the images was kept is a plain mean of cosine similarities: ``torchmetrics.MeanMetric``.

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
from scipy.stats import binom, norm, t
from torch import Tensor


def class_bias(frequencies: Tensor) -> Tensor:
    """Mean absolute difference between the frequencies of two classes, over all pairs of classes.

    In ascending order, the k-th of K frequencies is the larger of k−1 pairs and the smaller of K−k.

    Args:
        frequencies: the class frequencies f, with shape (..., K), K ≥ 2, in [0, 1].

    Returns:
        The bias, with shape (...), from 0 (all classes alike) to 2 / K (one class alone).

    Raises:
        ValueError: if there are fewer than two classes.
    """
    classes = frequencies.shape[-1]
    check_classes(classes)
    larger_minus_smaller = 2 * torch.arange(classes, device=frequencies.device) - (classes - 1)
    ascending = frequencies.sort(dim=-1).values
    return (ascending * larger_minus_smaller).sum(dim=-1) * 2 / (classes * (classes - 1))


def finite_sample_floor(images: Tensor | int, classes: int) -> Tensor:
    """Expected bias of n images whose classes are drawn from the uniform distribution.

    All pairs are alike. Of the n images m ~ Binomial(n, 2 / K) fall in a given pair, and its two counts
    differ like a random walk of m steps: E|S_m| = 2h C(m, h) / 2^m, h = ⌈m / 2⌉. The floor is E|S_m| / n.

    Args:
        images: the number of images n, of any shape, non-negative.
        classes: the number of classes K, at least 2.

    Returns:
        The floor in float64, with the shape of ``images``; NaN where n = 0.

    Raises:
        ValueError: if there are fewer than two classes or a negative number of images.
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
    """Bootstrap interval of the mean bias over prompts and images, or of the mean distance from a target.

    A confidence interval for the *expected* mean bias of audits like this one: other prompts of the same
    kind, other noise, as many prompts and images. That expectation includes the finite-sample floor, so the
    interval of a fair model lies around its floor, not around 0, and intervals compare only at equal numbers
    of images.

    Plainly resampling images within resampled prompts errs twice. |f_i − f_j| is convex, so a resample is
    more biased than what it came from: here only its deviation from the mean of the resamples is used. And
    the biases of the P prompts already differ by image noise, which would count double: here the deviations
    are weighted by 1 / √P, so that the variance of a prompt is (P−1)/P (τ² + v) + v/P = (P−1)/P τ² + v, with
    τ² between prompts and v from images. One prompt gives the bootstrap over its images alone, many prompts
    give the bootstrap over prompts. The tails are widened as the t distribution with P − 1 degrees of freedom
    asks (the expanded percentile interval).

    In simulations the 95 % interval held its coverage from 10 prompts on, fair models included. It is too narrow
    where prompts are few and of very different kinds: 75 % of the time it held with 10 prompts of which one in ten
    shows one class alone. Where all images of all prompts are of one class, it is a point.

    Args:
        counts: the number of images per prompt and class, with shape (P, K). Prompts without any are
            left out.
        level: the coverage, in (0, 1).
        draws: the number of bootstrap draws.
        seed: the seed of the draws.
        target: with shape (P, K), for the total variation of each prompt from its target instead of the bias.

    Returns:
        The lower and the upper end, in [0, 2 / K], or [0, 1] of a distance; both NaN without any image.

    Raises:
        ValueError: if an argument is not as described.
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
) -> np.ndarray:
    """Draws of the mean bias or distance, with shape (draws,); see ``bootstrap_interval``."""

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
    """Total variation distance between two class distributions, ½ Σ_k |f_k − g_k|.

    Args:
        before: the class frequencies f before finetuning, with shape (K,), summing to one.
        after: the class frequencies g after it, with shape (K,), summing to one.

    Returns:
        The share of images that would have to change class, in [0, 1].

    Raises:
        ValueError: if the shapes differ.
    """
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(
            "`before` and `after` must have the same shape (classes,), "
            f"but got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    return float((before - after).abs().sum() / 2)


Watched = tuple[str, str, str]  # what a summary is of: judge, attribute, model


@dataclass
class BiasSummary:
    """The fairness of a model on a list of prompts; NaN where no image shows a face.

    Not frozen because torchmetrics refuses to return frozen dataclasses; treat it as if it were.

    Args:
        classes: the names of the K classes.
        frequencies: the frequency of each class among all images with a face, pooled over prompts.
        bias: the mean over prompts of the bias, in [0, 2 / K].
        spread: the standard deviation of the bias over prompts (the paper's ±).
        floor: the mean over prompts of the finite-sample floor.
        low: the lower end of the 95 % bootstrap interval of ``bias``.
        high: its upper end.
        images: the number of images seen.
        no_face_images: how many of these show no face and thus count nowhere else.
        prompts: the number of prompts averaged, those with at least one face.
        prompts_no_face: the number of prompts left out because none of their images shows a face.
        per_prompt: the bias of each prompt, NaN where it was not seen or shows no face.
        counts: for each prompt the number of images of each class.
        no_face: for each prompt the number of images without a face.
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
        """The summary of some of the prompts, by their index."""
        rows = torch.tensor(list(prompts), dtype=torch.int64)
        return summarize_bias(torch.tensor(self.counts)[rows], torch.tensor(self.no_face)[rows], self.classes)

    def as_dict(self) -> dict[str, object]:
        """The fields as what JSON knows: lists for tuples, None for NaN."""
        return {name: _json_value(value) for name, value in asdict(self).items()}


def summarize_bias(counts: Tensor, no_face: Tensor, classes: Sequence[str]) -> BiasSummary:
    """Sums up the class counts of an audit.

    Args:
        counts: the number of images with a face per prompt and class, with shape (P, K), integer.
        no_face: the number of images without a face per prompt, with shape (P,), integer.
        classes: the names of the K classes.

    Returns:
        The summary.
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
        ValueError: if there are fewer.
    """
    if classes < 2:
        raise ValueError(f"`classes` must be at least 2 for a bias between them, but got {classes}")


def _json_value(value: object) -> object:
    if isinstance(value, tuple):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
