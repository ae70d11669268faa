"""Optimal assignments of images to drawn classes."""

import numpy as np
import pytest
from scipy.optimize import linprog

from fairness_dft import assignment
from fairness_dft.assignment import hungarian_assignment, optimal_assignments, priced_assignments


def costs(images: int, classes: int, seed: int = 0) -> np.ndarray:
    """Costs without structure, of any sign."""
    return np.random.default_rng(seed).normal(size=(images, classes))


def draws(images: int, classes: int, number: int = 100, seed: int = 0) -> np.ndarray:
    """Counts of uneven classes, the last of which is rare."""
    shares = np.append(np.arange(1.0, classes), 0.05)
    return np.random.default_rng(seed).multinomial(images, shares / shares.sum(), number)


def counted(assigned: np.ndarray, classes: int) -> np.ndarray:
    """How many images each class got."""
    return np.stack([(assigned == k).sum(axis=1) for k in range(classes)], axis=1)


@pytest.mark.parametrize(("images", "classes"), [(5, 3), (9, 2), (12, 4)])
def test_the_hungarian_algorithm_equals_a_linear_programme(images: int, classes: int) -> None:
    cost = costs(images, classes)
    every_image = np.kron(np.eye(images), np.ones(classes))
    every_class = np.kron(np.ones(images), np.eye(classes))
    for count in draws(images, classes, 10):
        assigned = hungarian_assignment(cost, count)
        optimum = linprog(cost.ravel(), A_eq=[*every_image, *every_class], b_eq=[*np.ones(images), *count])
        assert np.bincount(assigned, minlength=classes).tolist() == count.tolist()
        assert cost[np.arange(images), assigned].sum() == pytest.approx(optimum.fun)


@pytest.mark.parametrize(("images", "classes"), [(3, 2), (24, 4), (70, 3), (130, 8), (256, 4), (100, 16)])
def test_what_prices_find_is_what_the_hungarian_algorithm_finds(images: int, classes: int) -> None:
    cost, counts = costs(images, classes), draws(images, classes)
    assigned = priced_assignments(cost, counts)
    done = assigned[:, 0] >= 0
    assert done.mean() > 0.5
    for found, count in zip(assigned[done], counts[done], strict=True):
        assert found.tolist() == hungarian_assignment(cost, count).tolist()


def test_prices_serve_draws_that_leave_classes_out_or_have_one_alone() -> None:
    cost, counts = costs(80, 3), np.array([[80, 0, 0], [0, 80, 0], [0, 0, 80], [40, 40, 0], [0, 1, 79], [79, 0, 1]])
    assigned = priced_assignments(cost, counts)
    assert assigned.tolist() == [hungarian_assignment(cost, count).tolist() for count in counts]


def test_equal_images_that_a_draw_divides_are_left_to_the_hungarian_algorithm() -> None:
    cost = np.repeat(costs(8, 3), 10, axis=0)
    counts = draws(80, 3)
    left = priced_assignments(cost, counts)[:, 0] < 0
    divided = (counts % 10 != 0).any(axis=1)
    assert divided.any()
    assert left[divided].all()
    expected = [hungarian_assignment(cost, count).tolist() for count in counts]
    assert optimal_assignments(cost, counts).tolist() == expected


def test_draws_that_find_no_prices_in_time_are_left() -> None:
    cost, counts = costs(256, 8), draws(256, 8)
    left = [int((priced_assignments(cost, counts, rounds)[:, 0] < 0).sum()) for rounds in (1, 3, 12)]
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize("images", [assignment.PRICED_FROM - 1, assignment.PRICED_FROM])
@pytest.mark.parametrize("number", [1, assignment.DRAWS_AT_ONCE, assignment.DRAWS_AT_ONCE + 1, 150])
def test_all_draws_are_solved_in_their_order(images: int, number: int) -> None:
    cost, counts = costs(images, 5), draws(images, 5, number)
    assigned = optimal_assignments(cost, counts)
    assert counted(assigned, 5).tolist() == counts.tolist()
    assert assigned.tolist() == [hungarian_assignment(cost, count).tolist() for count in counts]


def test_many_images_do_not_call_the_hungarian_algorithm_for_each_draw(monkeypatch) -> None:
    called = []
    monkeypatch.setattr(assignment, "linear_sum_assignment", lambda cost: called.append(cost) or (None, [0]))
    optimal_assignments(costs(256, 4), draws(256, 4))
    assert len(called) < 5
