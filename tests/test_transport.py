"""Expected optimal-transport targets against brute force over permutations, and each other."""

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy.stats import binom

from fairness_dft.transport import (
    Targets,
    draw_counts,
    enumerate_counts,
    expected_assignment,
    expected_targets,
    mean_assignment,
    transport_cost,
)


def random_probabilities(images: int, classes: int, sharpness: float = 2.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(images, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(dim=1)


def brute_force(probabilities: torch.Tensor, target: list[float]) -> torch.Tensor:
    """The definition itself: every draw of u_1, ..., u_n, every permutation of it."""
    images, classes = probabilities.shape
    corners = torch.eye(classes, dtype=probabilities.dtype)
    distance = [[float((p - corner).norm()) for corner in corners] for p in probabilities]
    expected = torch.zeros_like(probabilities)
    for draw in product(range(classes), repeat=images):
        weight = np.prod([target[label] for label in draw])
        best = min(permutations(draw), key=lambda labels: sum(distance[i][k] for i, k in enumerate(labels)))
        for i, label in enumerate(best):
            expected[i, label] += weight
    return expected


@pytest.mark.parametrize("target", [[0.5, 0.5], [0.75, 0.25], [0.0, 1.0]])
@pytest.mark.parametrize("images", [1, 2, 5, 6])
def test_two_classes_equal_brute_force(images: int, target: list[float]) -> None:
    probabilities = random_probabilities(images, 2, seed=images)
    targets = expected_targets(probabilities, target)
    torch.testing.assert_close(targets.probabilities, brute_force(probabilities, target))


@pytest.mark.parametrize("target", [[1 / 3, 1 / 3, 1 / 3], [0.6, 0.3, 0.1], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
@pytest.mark.parametrize("images", [1, 2, 5])
def test_three_classes_equal_brute_force(images: int, target: list[float]) -> None:
    probabilities = random_probabilities(images, 3, seed=images)
    targets = expected_targets(probabilities, target)
    torch.testing.assert_close(targets.probabilities, brute_force(probabilities, target))


@pytest.mark.parametrize("share", [0.5, 0.25, 0.01])
@pytest.mark.parametrize("images", [1, 2, 7, 24])
def test_closed_form_equals_enumeration(images: int, share: float) -> None:
    cost = transport_cost(random_probabilities(images, 2).numpy())
    counts = enumerate_counts(images, 2)
    enumerated = mean_assignment(cost, counts, binom.pmf(counts[:, 1], images, share))
    np.testing.assert_allclose(expected_assignment(cost, np.array([1 - share, share])), enumerated, atol=1e-12)


@pytest.mark.parametrize("target", [[0.25, 0.25, 0.25, 0.25], [0.4, 0.0, 0.5, 0.1]])
def test_draws_approach_enumeration(target: list[float]) -> None:
    probabilities = random_probabilities(9, 4)
    draws = 4000
    exact = expected_targets(probabilities, target).probabilities
    drawn = expected_targets(
        probabilities, target, draws=draws, max_enumeration=0, generator=torch.Generator().manual_seed(0)
    ).probabilities
    error = (exact * (1 - exact) / draws).sqrt()
    assert not torch.equal(drawn, exact)
    assert bool(((drawn - exact).abs() <= 5 * error + 1e-3).all())


def test_draws_repeat_with_the_seed() -> None:
    probabilities = random_probabilities(8, 8)
    target = [1 / 8] * 8
    first, again, other = (
        expected_targets(
            probabilities, target, max_enumeration=0, generator=torch.Generator().manual_seed(seed)
        ).probabilities
        for seed in (1, 1, 2)
    )
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_hand_worked_two_images() -> None:
    """Fair target, two images: 1 − (1/2)² = 3/4 of the draws hold a class 1, for the likelier image."""
    targets = expected_targets(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), [0.5, 0.5])
    torch.testing.assert_close(targets.probabilities, torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    torch.testing.assert_close(targets.classes, torch.tensor([0, 1]))
    torch.testing.assert_close(targets.confidence, torch.tensor([0.75, 0.75]))


@pytest.mark.parametrize("classes", [2, 3, 4, 8])
@pytest.mark.parametrize("images", [1, 3, 8, 13])
def test_targets_follow_the_distribution(images: int, classes: int) -> None:
    """Rows sum to one always, columns to n · D when nothing is drawn."""
    target = torch.arange(1.0, classes + 1) / sum(range(1, classes + 1))
    targets = expected_targets(random_probabilities(images, classes), target, draws=50)
    drawn = math.comb(images + classes - 1, classes - 1) > 10_000
    torch.testing.assert_close(targets.probabilities.sum(1), torch.ones(images, dtype=torch.float64))
    if not drawn:
        torch.testing.assert_close(targets.probabilities.mean(0), target.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(targets.confidence, targets.probabilities.amax(1))
    torch.testing.assert_close(targets.classes, targets.probabilities.argmax(1))


def test_order_of_images_does_not_matter() -> None:
    probabilities = random_probabilities(7, 3)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    targets = expected_targets(probabilities, [0.2, 0.5, 0.3]).probabilities
    shuffled = expected_targets(probabilities[order], [0.2, 0.5, 0.3]).probabilities
    torch.testing.assert_close(shuffled, targets[order])


@pytest.mark.parametrize("classes", [2, 3])
def test_ties_are_still_optimal(classes: int) -> None:
    """With equal images q is not unique, but its expected cost and its column sums are."""
    probabilities = torch.cat([random_probabilities(1, classes).expand(3, -1), random_probabilities(2, classes)])
    target = [1 / classes] * classes
    cost = torch.from_numpy(transport_cost(probabilities.numpy()))
    targets = expected_targets(probabilities, target).probabilities
    reference = brute_force(probabilities, target)
    torch.testing.assert_close((cost * targets).sum(), (cost * reference).sum())
    torch.testing.assert_close(targets.sum(0), reference.sum(0))


def test_saturated_images_still_get_confident_targets() -> None:
    """24 identical images: the first in order are sent to one class, the last to the other."""
    targets = expected_targets(torch.tensor([[1.0, 0.0]]).expand(24, -1), [0.5, 0.5])
    expected = torch.from_numpy(binom.sf(np.arange(24), 24, 0.5)).float()
    torch.testing.assert_close(targets.probabilities[:, 1], expected)
    assert int((targets.confidence >= 0.8).sum()) == 20


def test_excluded_classes_are_never_targets() -> None:
    """Two classes of eight are a two-class problem, solved exactly where eight would have to be drawn."""
    probabilities = random_probabilities(24, 8)
    targets = expected_targets(probabilities, [0.0, 0.4, 0.0, 0.0, 0.6, 0.0, 0.0, 0.0]).probabilities
    cost = transport_cost(probabilities.numpy())[:, [1, 4]]
    np.testing.assert_allclose(targets[:, [1, 4]], expected_assignment(cost, np.array([0.4, 0.6])))
    assert not targets[:, [0, 2, 3, 5, 6, 7]].any()


@pytest.mark.parametrize("classes", [1, 2, 4, 8])
def test_no_images(classes: int) -> None:
    targets = expected_targets(torch.zeros(0, classes), [1 / classes] * classes)
    assert targets.probabilities.shape == (0, classes)
    assert targets.classes.shape == targets.confidence.shape == (0,)
    assert targets.classes.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_follows_the_input(dtype: torch.dtype) -> None:
    probabilities = random_probabilities(5, 3).to(dtype).requires_grad_()
    targets = expected_targets(probabilities, torch.tensor([0.2, 0.3, 0.5]))
    assert targets.probabilities.dtype == targets.confidence.dtype == dtype
    assert not targets.probabilities.requires_grad


@pytest.mark.parametrize(("images", "classes", "number"), [(0, 3, 1), (3, 1, 1), (4, 2, 5), (5, 3, 21), (32, 4, 6545)])
def test_enumerated_counts(images: int, classes: int, number: int) -> None:
    counts = enumerate_counts(images, classes)
    assert counts.shape == (number, classes)
    assert len(np.unique(counts, axis=0)) == number
    assert (counts >= 0).all()
    assert (counts.sum(1) == images).all()


def test_drawn_counts_are_multinomial() -> None:
    distribution = np.array([0.2, 0.3, 0.5])
    counts, weights = draw_counts(10, distribution, 20_000, torch.Generator().manual_seed(0))
    assert weights.sum() == 20_000
    assert (counts.sum(1) == 10).all()
    np.testing.assert_allclose(np.average(counts, axis=0, weights=weights), 10 * distribution, atol=0.06)


def test_the_papers_batch_of_four_classes_is_enumerated() -> None:
    """32 images: 6,545 count vectors are solved exactly, so that no random generator has a say."""
    probabilities = random_probabilities(32, 4)
    found = [
        expected_targets(probabilities, [0.25] * 4, draws=1, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    ]
    assert len(enumerate_counts(32, 4)) == math.comb(35, 3) == 6_545
    assert found[0].probabilities.equal(found[1].probabilities)


@pytest.mark.parametrize(
    "target",
    [[0.5, 0.6], [0.33, 0.33], [1.5, -0.5], [float("nan"), 0.5], [[0.5, 0.5]], [], [float("inf"), 0.0]],
)
def test_bad_target_is_refused(target: list) -> None:
    with pytest.raises(ValueError, match="`target` must be one non-negative probability per class and sum to one"):
        expected_targets(torch.full((3, 2), 0.5), target)


@pytest.mark.parametrize(
    "probabilities", [torch.full((3, 2), 0.5), torch.full((3,), 0.5), torch.ones(3, 3, dtype=torch.int64)]
)
def test_probabilities_that_do_not_fit_are_refused(probabilities: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"`probabilities` must be floating point with shape \(n, 3\)"):
        expected_targets(probabilities, [0.2, 0.3, 0.5])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 3.0])
def test_values_that_are_no_probabilities_are_refused(value: float) -> None:
    probabilities = torch.tensor([[0.5, 0.5], [value, 0.5]])
    with pytest.raises(ValueError, match=r"`probabilities` must lie in \[0, 1\] without NaN, but row 1"):
        expected_targets(probabilities, [0.5, 0.5])


@pytest.mark.parametrize("limits", [{"draws": 0}, {"max_enumeration": -1}])
def test_bad_limits_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="`draws` must be at least 1 and `max_enumeration` at least 0"):
        expected_targets(torch.full((3, 2), 0.5), [0.5, 0.5], **limits)


@pytest.mark.parametrize("images", [1, 2, 3, 7, 8, 15, 16])
def test_a_draw_between_two_classes_is_no_target(images: int) -> None:
    """Of an odd number of images the middle one could be either; if it counted, it would always be class 0."""
    share = torch.linspace(0.1, 0.9, images)
    found = expected_targets(torch.stack((1 - share, share), dim=1), [0.5, 0.5])
    middle = torch.arange(images) == images // 2 if images % 2 else torch.zeros(images, dtype=torch.bool)
    assert found.decided(0.5).equal(~middle)
    assert found.decided(0.8).equal(found.confidence >= 0.8)
    mirrored = expected_targets(torch.stack((share, 1 - share), dim=1), [0.5, 0.5])
    assert mirrored.decided(0.5).equal(~middle)
    torch.testing.assert_close(mirrored.probabilities, found.probabilities.flip(1))


def test_a_draw_among_some_of_the_classes_is_no_target() -> None:
    shares = torch.tensor([[0.4, 0.4, 0.2], [0.5, 0.3, 0.2]])
    targets = Targets(shares, shares.argmax(1), shares.amax(1))
    assert targets.decided(0.3).tolist() == [False, True]
