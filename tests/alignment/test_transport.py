"""Expected optimal-transport targets against brute force over permutations, and each other."""

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy.stats import binom, multinomial

from fairness_dft.alignment.counts import draw_counts, enumerate_counts
from fairness_dft.alignment.transport import (
    Targets,
    expected_assignment,
    expected_joint_targets,
    expected_targets,
    mean_assignment,
    relative_to_target,
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
    assert targets.decided(0.75).tolist() == [True, True]  # as sure as asked for is sure enough
    assert targets.decided(0.76).tolist() == [False, False]


@pytest.mark.parametrize("classes", [2, 3, 4, 8])
@pytest.mark.parametrize("images", [1, 3, 8, 13, 90])
def test_targets_follow_the_distribution(images: int, classes: int) -> None:
    """Rows sum to one always, columns to n · D when all counts are solved, and nearly so when they are drawn."""
    target = torch.arange(1.0, classes + 1) / sum(range(1, classes + 1))
    targets = expected_targets(random_probabilities(images, classes), target)
    counts = 1 if classes == 2 else math.comb(images + classes - 1, classes - 1)
    torch.testing.assert_close(targets.probabilities.sum(1), torch.ones(images, dtype=torch.float64))
    tolerance = 1e-6 if counts <= 1_000 else 5e-3
    torch.testing.assert_close(targets.probabilities.mean(0), target.double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(targets.confidence, targets.probabilities.amax(1))
    torch.testing.assert_close(targets.classes, targets.probabilities.argmax(1))


@pytest.mark.parametrize("images", [7, 80])
def test_order_of_images_does_not_matter(images: int) -> None:
    def targets(probabilities: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return expected_targets(probabilities, [0.2, 0.5, 0.3], generator=generator).probabilities

    probabilities = random_probabilities(images, 3)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(targets(probabilities[order]), targets(probabilities)[order])


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


@pytest.mark.parametrize("images", [24, 100])
def test_saturated_images_of_many_classes_follow_the_distribution(images: int) -> None:
    target = [0.1, 0.2, 0.3, 0.4]
    targets = expected_targets(torch.eye(4)[torch.arange(images) % 4], target)
    torch.testing.assert_close(targets.probabilities.mean(0), torch.tensor(target), rtol=0, atol=5e-3)
    assert (targets.confidence >= 0.8).float().mean() > 0.5


@pytest.mark.parametrize("images", [5, 100])
def test_a_target_of_one_class_is_everybodys(images: int) -> None:
    targets = expected_targets(random_probabilities(images, 3), [0.0, 1.0, 0.0])
    assert targets.classes.tolist() == [1] * images
    assert targets.confidence.tolist() == [1.0] * images


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


@pytest.mark.parametrize("distribution", [[0.2, 0.3, 0.5], [0.9, 0.1], [0.05, 0.15, 0.3, 0.5]])
def test_drawn_counts_are_multinomial(distribution: list[float]) -> None:
    draws, images = 2**15, 6
    counts, weights = draw_counts(images, np.array(distribution), draws, torch.Generator().manual_seed(0))
    assert weights.sum() == draws
    assert (counts >= 0).all() and (counts.sum(1) == images).all()
    expected = multinomial.pmf(counts, images, distribution)
    assert expected.sum() > 0.9999
    # Independent draws would be this far off by their standard error, and at most a few times it.
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(weights / draws - expected) < 2 * error + 1e-4).all()


def test_the_corner_of_the_cube_is_a_draw_like_any_other(monkeypatch) -> None:
    """A Sobol sequence may hold an exact 0, of which scipy's binomial quantile is -1."""
    monkeypatch.setattr("scipy.stats.qmc.Sobol.random_base2", lambda *_: np.zeros((1, 3)))
    assert draw_counts(9, np.full(4, 0.25), 1)[0].tolist() == [[0, 0, 0, 9]]


@pytest.mark.parametrize("draws", [1, 2, 3, 100, 256])
def test_there_are_as_many_draws_as_asked_for(draws: int) -> None:
    assert draw_counts(9, np.full(4, 0.25), draws, torch.Generator().manual_seed(0))[1].sum() == draws


@pytest.mark.parametrize(("images", "classes", "closer"), [(24, 4, 2.0), (40, 4, 2.0), (12, 8, 1.4)])
def test_drawn_targets_are_right_on_average_and_closer_than_independent_draws(
    images: int, classes: int, closer: float
) -> None:
    """64 draws come this many times as close as 64 independent ones, and their mean over seeds closer still."""
    cost = transport_cost(random_probabilities(images, classes).numpy())
    shares, seeds, draws = np.arange(1.0, classes + 1) / sum(range(1, classes + 1)), range(16), 64
    if classes == 4:
        everything = enumerate_counts(images, classes)
        exact = mean_assignment(cost, everything, multinomial.pmf(everything, images, shares))
    else:
        everything = np.random.default_rng(1).multinomial(images, shares, 100_000)
        exact = mean_assignment(cost, *np.unique(everything, axis=0, return_counts=True))
    ours = [mean_assignment(cost, *draw_counts(images, shares, draws, torch.Generator().manual_seed(s))) for s in seeds]
    independent = [
        mean_assignment(cost, np.random.default_rng(s).multinomial(images, shares, draws), np.ones(draws))
        for s in seeds
    ]
    error, theirs = (np.mean([np.abs(found - exact).mean() for found in each]) for each in (ours, independent))
    assert error < theirs / closer
    assert np.abs(np.mean(ours, axis=0) - exact).mean() < error / 2


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


def brute_force_joint(gender: torch.Tensor, age: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Expected joint assignment, with shape (n, K_1, K_2), by every draw and every permutation of it."""
    classes = list(product(range(gender.shape[1]), range(age.shape[1])))
    expected = torch.zeros(len(gender), *target.shape, dtype=torch.float64)
    eyes = torch.eye(gender.shape[1], dtype=torch.float64), torch.eye(age.shape[1], dtype=torch.float64)

    def distance(i: int, label: tuple[int, int]) -> float:
        apart = (gender[i] - eyes[0][label[0]], age[i] - eyes[1][label[1]])
        return math.sqrt(sum(float(difference @ difference) for difference in apart))

    for draw in product(classes, repeat=len(gender)):
        weight = np.prod([float(target[label]) for label in draw])
        best = min(permutations(draw), key=lambda labels: sum(distance(i, label) for i, label in enumerate(labels)))
        for i, label in enumerate(best):
            expected[(i, *label)] += weight
    return expected


@pytest.mark.parametrize("images", [1, 2, 4])
@pytest.mark.parametrize("table", [[[0.25, 0.25], [0.25, 0.25]], [[0.5, 0.1], [0.4, 0.0]], [[0.375, 0.125]] * 2])
def test_joint_targets_equal_brute_force(images: int, table: list[list[float]]) -> None:
    gender, age = random_probabilities(images, 2, seed=images), random_probabilities(images, 2, seed=images + 10)
    target = torch.tensor(table, dtype=torch.float64)
    expected = brute_force_joint(gender, age, target)
    of_gender, of_age = expected_joint_targets([gender, age], target)
    torch.testing.assert_close(of_gender.probabilities, expected.sum(2))
    torch.testing.assert_close(of_age.probabilities, expected.sum(1))
    for found in (of_gender, of_age):
        torch.testing.assert_close(found.confidence, found.probabilities.amax(1))
        torch.testing.assert_close(found.classes, found.probabilities.argmax(1))


def test_joint_targets_of_three_attributes_follow_the_marginals() -> None:
    seen = [random_probabilities(5, classes, seed=classes) for classes in (2, 3, 2)]
    target = torch.rand(2, 3, 2, dtype=torch.float64)
    target /= target.sum()
    found = expected_joint_targets(seen, target, draws=20_000, generator=torch.Generator().manual_seed(0))
    marginals = (target.sum((1, 2)), target.sum((0, 2)), target.sum((0, 1)))
    for targets, marginal, values in zip(found, marginals, seen, strict=True):
        assert targets.probabilities.shape == values.shape
        torch.testing.assert_close(targets.probabilities.mean(0), marginal, rtol=0, atol=0.01)


def test_joint_cost_is_in_the_order_of_the_flattened_product() -> None:
    first, second = torch.tensor([[0.9, 0.1]]).numpy(), torch.tensor([[0.2, 0.3, 0.5]]).numpy()
    cost = transport_cost(first, second).reshape(2, 3)
    for i, j in product(range(2), range(3)):
        apart = np.concatenate([first[0] - np.eye(2)[i], second[0] - np.eye(3)[j]])
        np.testing.assert_allclose(cost[i, j], np.linalg.norm(apart), rtol=1e-6)


def test_no_faces_have_no_joint_targets() -> None:
    found = expected_joint_targets([torch.zeros(0, 2), torch.zeros(0, 4)], torch.full((2, 4), 1 / 8))
    assert [tuple(targets.probabilities.shape) for targets in found] == [(0, 2), (0, 4)]


def test_joint_target_of_another_shape_is_refused() -> None:
    seen = [random_probabilities(3, 2), random_probabilities(3, 4)]
    with pytest.raises(ValueError, match="`target` must be one non-negative probability per class"):
        expected_joint_targets(seen, [0.125] * 8)
    with pytest.raises(ValueError, match=r"with shape \(n, 4\)"):
        expected_joint_targets(seen, torch.full((4, 2), 1 / 8))


def test_rescaling_makes_the_targets_share_the_even_point() -> None:
    young_old = np.array([0.75, 0.25])
    relative = relative_to_target(np.array([[0.75, 0.25], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0]]), young_old)
    np.testing.assert_allclose(relative, [[0.5, 0.5], [0.75, 0.25], [0.25, 0.75], [0, 1]], atol=1e-9)
    values = random_probabilities(5, 4).numpy()
    np.testing.assert_allclose(relative_to_target(values, np.full(4, 0.25)), values)
    excluded = relative_to_target(np.array([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]]), np.array([0.5, 0.0, 0.5]))
    np.testing.assert_allclose(excluded, [[0.4, 0, 0.6], [0.5, 0, 0.5]], atol=1e-9)


def test_rescaling_decides_who_becomes_old_in_a_joint_target() -> None:
    """Half the faces shall be women, a quarter old, independently.

    The second face, clearly a man's, is old with 0.3, more than the target's quarter; the third, clearly a woman's,
    with 0.1, which is less. Relative to the target the second is asked to become old more often, the third less.
    """
    gender = torch.tensor([[0.55, 0.45], [0.95, 0.05], [0.05, 0.95], [0.05, 0.95]], dtype=torch.float64)
    age = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1], [0.9, 0.1]], dtype=torch.float64)
    target = torch.tensor([[0.375, 0.125], [0.375, 0.125]], dtype=torch.float64)
    (_, plain), (_, rescaled) = (
        expected_joint_targets([gender, age], target, rescale_cost=rescale) for rescale in (False, True)
    )
    assert rescaled.probabilities[1, 1] > plain.probabilities[1, 1] + 0.04
    assert rescaled.probabilities[2, 1] < plain.probabilities[2, 1] - 0.04
    # Nothing changes in the sums, nor for one attribute alone, whose order stays what it was.
    torch.testing.assert_close(rescaled.probabilities.sum(0), plain.probabilities.sum(0))
    one = [expected_joint_targets([age], target[0] * 2, rescale_cost=r)[0].probabilities for r in (False, True)]
    torch.testing.assert_close(*one)
