"""Distances between sets of embeddings, against their definitions in numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from fairness_dft.fidelity import Fidelity


def two_sets(count: int = 60, dimension: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    before = torch.randn(count, dimension, generator=random)
    after = torch.randn(count, dimension, generator=random) * 0.5 + 0.7
    return torch.nn.functional.normalize(before, dim=1), torch.nn.functional.normalize(after, dim=1)


def measured(before: torch.Tensor, after: torch.Tensor, batches: int = 3) -> dict[str, float]:
    fidelity = Fidelity(before.shape[1])
    for parts in zip(before.chunk(batches), after.chunk(batches), strict=True):
        fidelity.update(*parts)
    return fidelity.compute()


def test_frechet_distance_is_that_of_two_gaussians() -> None:
    sets = two_sets()
    x, y = (part.double().numpy() * np.sqrt(5) for part in sets)
    means, covariances = (x.mean(0), y.mean(0)), (np.cov(x.T), np.cov(y.T))
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert measured(*sets)["fid"] == pytest.approx(expected, rel=1e-3)


def test_kernel_distance_is_the_unbiased_squared_discrepancy() -> None:
    """Of all pictures at once, as here, every subset gives the same."""
    sets = two_sets()
    x, y = (part.double().numpy() * np.sqrt(5) for part in sets)
    n = len(x)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / 5 + 1) ** 3

    within = sum((kernel(a, a).sum() - np.trace(kernel(a, a))) / (n * (n - 1)) for a in (x, y))
    expected = within - 2 * kernel(x, y).mean()
    assert measured(*sets)["kid"] == pytest.approx(expected, rel=1e-3)


def test_the_same_pictures_have_not_moved() -> None:
    before, _ = two_sets()
    found = measured(before, before)
    assert found["fid"] == pytest.approx(0, abs=1e-3) and found["kid"] <= 0
    assert measured(before, before) == found


def test_one_picture_says_nothing() -> None:
    before, after = two_sets(1)
    assert measured(before, after, batches=1) is None
