"""Optimal assignments of images to drawn classes."""

from unittest.mock import Mock

import numpy as np
import pytest
from scipy.optimize import linprog

from fairness_dft.alignment import assignment
from fairness_dft.alignment.assignment import (
    DRAWS_AT_ONCE,
    hungarian_assignment,
    optimal_assignments,
    priced_assignments,
)
from fairness_dft.alignment.transport import transport_cost


def costs(images: int, classes: int, seed: int = 0) -> np.ndarray:
    """Costs without structure, of any sign."""
    return np.random.default_rng(seed).normal(size=(images, classes))


def draws(images: int, classes: int, number: int = 100, seed: int = 0) -> np.ndarray:
    """Counts of uneven classes, the last of which is rare."""
    shares = np.append(np.arange(1.0, classes), 0.05)
    return np.random.default_rng(seed).multinomial(images, shares / shares.sum(), number)


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


def test_prices_serve_two_attributes() -> None:
    generator = np.random.default_rng(0)
    cost = transport_cost(generator.dirichlet([0.3] * 2, 200), generator.dirichlet([0.3] * 4, 200))
    counts = generator.multinomial(200, np.full(8, 1 / 8), 50)
    assigned = priced_assignments(cost, counts)
    done = assigned[:, 0] >= 0
    assert done.mean() > 0.9
    assert assigned[done].tolist() == [hungarian_assignment(cost, count).tolist() for count in counts[done]]


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


@pytest.mark.parametrize(
    ("images", "number"), [(63, 10), (64, 1), (64, DRAWS_AT_ONCE), (64, DRAWS_AT_ONCE + 1), (90, 150)]
)
def test_all_draws_are_solved_in_their_order(images: int, number: int) -> None:
    cost, counts = costs(images, 5), draws(images, 5, number)
    assigned = optimal_assignments(cost, counts)
    assert np.stack([(assigned == k).sum(axis=1) for k in range(5)], axis=1).tolist() == counts.tolist()
    assert assigned.tolist() == [hungarian_assignment(cost, count).tolist() for count in counts]


@pytest.mark.parametrize("images", [3, 100])
def test_one_class_is_for_all(images: int) -> None:
    assert optimal_assignments(costs(images, 1), np.array([[images]] * 2)).tolist() == [[0] * images] * 2


def test_many_images_do_not_call_the_hungarian_algorithm_for_each_draw(monkeypatch) -> None:
    solver = Mock(wraps=assignment.linear_sum_assignment)
    monkeypatch.setattr(assignment, "linear_sum_assignment", solver)
    optimal_assignments(costs(256, 4), draws(256, 4))
    assert solver.call_count < 5
