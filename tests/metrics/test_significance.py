"""Statistics against exact enumeration, scipy, and values worked out by hand."""

from itertools import product
from math import comb

import numpy as np
import pytest
from scipy.stats import entropy, hypergeom, multinomial, sem, t

from fairness_dft.metrics.significance import (
    distance_by_prompt,
    gap_by_chance,
    gap_interval,
    permutation_test,
    squared_gaps,
    swap_test,
    target_distance,
    unbiased_rms_gap,
    unfairness,
)


def squared(counts: list[int]) -> float:
    """What `unbiased_rms_gap` averages for one prompt, also where it is negative."""
    n = sum(counts)
    shares = [count / n for count in counts]
    pairs = [(a, b) for i, a in enumerate(shares) for b in shares[i + 1 :]]
    return sum((n * (a - b) ** 2 - a - b) / (n - 1) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize(("n", "p"), [(2, [0.5, 0.5]), (5, [0.9, 0.1]), (6, [0.25] * 4), (7, [0.6, 0.3, 0.1, 0.0])])
def test_squared_gap_is_unbiased(n: int, p: list[float]) -> None:
    """Its mean over all tables that can be drawn is the true one."""
    tables = [table for table in product(range(n + 1), repeat=len(p)) if sum(table) == n]
    law = multinomial(n, p)
    mean = sum(law.pmf(table) * squared(list(table)) for table in tables)
    pairs = [(a - b) ** 2 for i, a in enumerate(p) for b in p[i + 1 :]]
    assert mean == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_gap_without_chance_by_hand() -> None:
    # (10 · .36 - 1) / 9 and (4 · 1 - 1) / 3
    assert unbiased_rms_gap([[8, 2], [0, 4]]) == pytest.approx(np.sqrt((2.6 / 9 + 1) / 2))
    assert unbiased_rms_gap([[8, 2], [0, 4], [1, 0], [0, 0]]) == unbiased_rms_gap([[8, 2], [0, 4]])
    assert unbiased_rms_gap([[3, 1, 2]]) == pytest.approx(np.sqrt(max(squared([3, 1, 2]), 0)))
    assert unbiased_rms_gap([[5, 5], [3, 3]]) == 0
    assert np.isnan(unbiased_rms_gap([[1, 0], [0, 0]]))


def test_gap_interval_is_students_and_holds_its_coverage() -> None:
    random = np.random.default_rng(0)
    shares = random.beta(2, 3, size=(1000, 50))  # of the first class, prompt by prompt; E (2p - 1)² by the moments
    expected = 4 * (0.04 + 0.4**2) - 4 * 0.4 + 1
    first = random.binomial(30, shares)
    covered = [low**2 <= expected <= high**2 for low, high in (gap_interval(np.stack([x, 30 - x], 1)) for x in first)]
    assert 0.93 < np.mean(covered) < 0.97
    counts = np.array([[20, 10], [25, 5], [14, 16], [9, 21]] * 3)
    each = [squared_gaps(row[None]) for row in counts]
    low, high = t.interval(0.95, 11, np.mean(each), sem(each))
    assert gap_interval(counts) == pytest.approx((max(low, 0) ** 0.5, high**0.5))
    assert gap_interval(counts)[0] <= unbiased_rms_gap(counts) <= gap_interval(counts)[1]
    assert np.isnan(gap_interval(counts[:9])).all()


def test_gap_by_chance_is_what_fair_models_stay_below() -> None:
    random = np.random.default_rng(3)
    for images, classes in (([48] * 25, 2), ([20, 40, 60], 4)):
        limit = gap_by_chance(images, classes)
        gaps = [unbiased_rms_gap(random.multinomial(images, [1 / classes] * classes)) for _ in range(2000)]
        assert np.mean(np.array(gaps) <= limit) == pytest.approx(0.95, abs=0.02)
    assert np.isnan(gap_by_chance([1, 0], 2))


def test_a_turned_model_is_another_one() -> None:
    """Its bias is the same, but the models are not: the null hypothesis is about them."""
    random = np.random.default_rng(2)
    turned = [
        permutation_test(
            random.multinomial(48, [0.7, 0.3], 10), random.multinomial(48, [0.3, 0.7], 10), None, 200, seed
        )
        for seed in range(60)
    ]
    assert np.mean(np.array(turned) <= 0.05) > 0.1


def test_permutation_test_is_the_hypergeometric_law() -> None:
    """One prompt and two classes, where all ways to deal can be counted."""
    before, after = [9, 1], [4, 6]
    law = hypergeom(20, 13, 10)  # of 20 images 13 show the first class, and 10 are dealt to "after"
    changes = {k: abs(2 * k / 10 - 1) - abs(2 * (13 - k) / 10 - 1) for k in range(3, 11)}
    observed = abs(0.4 - 0.6) - abs(0.9 - 0.1)
    exact = sum(law.pmf(k) for k, change in changes.items() if abs(change) >= abs(observed) - 1e-9)
    assert permutation_test([before], [after], permutations=20_000) == pytest.approx(exact, abs=0.01)


def test_permutation_test_over_prompts_by_brute_force() -> None:
    """All ways to deal the images of two prompts."""
    before, after = [[3, 0], [2, 1]], [[1, 2], [1, 2]]
    observed = unfairness(np.array(after)).sum() - unfairness(np.array(before)).sum()
    total = extreme = 0
    ways = [
        [(k, comb(4, k) * comb(2, 3 - k)) for k in range(1, 4)],
        [(k, comb(3, k) * comb(3, 3 - k)) for k in range(4)],
    ]
    for (k, many), (m, more) in product(*ways):
        dealt = np.array([[k, 3 - k], [m, 3 - m]])
        change = (unfairness(dealt) - unfairness(np.array([[4, 2], [3, 3]]) - dealt)).sum()
        total += many * more
        extreme += many * more * (abs(change) >= abs(observed) - 1e-9)
    assert permutation_test(before, after, permutations=20_000) == pytest.approx(extreme / total, abs=0.01)


def test_permutation_test_at_its_ends() -> None:
    random = np.random.default_rng(0)
    fair = random.multinomial(40, [0.5, 0.5], size=30)
    skewed = random.multinomial(40, [0.9, 0.1], size=30)
    assert permutation_test(skewed, fair) == pytest.approx(1 / 2001)
    assert permutation_test(fair, skewed) == pytest.approx(1 / 2001)
    assert permutation_test(fair, fair) == 1
    assert permutation_test([*skewed, [0, 0]], [*fair, [3, 4]]) == permutation_test(skewed, fair)
    assert np.isnan(permutation_test([[0, 0]], [[1, 1]]))
    with pytest.raises(ValueError, match="one shape"):
        permutation_test([[1, 2]], [[1, 2, 3]])


def test_under_the_null_small_values_are_rare() -> None:
    random = np.random.default_rng(1)
    values = [
        permutation_test(*(random.multinomial(20, [0.8, 0.2], size=10) for _ in range(2)), permutations=200, seed=i)
        for i in range(200)
    ]
    assert 0.01 < np.mean(np.array(values) <= 0.1) < 0.18


def means(counts: list, target: list) -> list[float]:
    return [float(np.nanmean(of)) for of in distance_by_prompt(counts, target)]


def test_distance_by_prompt_and_its_floor() -> None:
    counts, target = [[6, 4], [0, 10], [0, 0], [2, 1]], [0.25, 0.75]
    found, floor = means(counts, target)
    assert found == pytest.approx((0.35 + 0.25 + (2 / 3 - 0.25)) / 3)
    random = np.random.default_rng(0)
    drawn = [means([random.multinomial(n, target) for n in (10, 10, 3)], target)[0] for _ in range(4000)]
    assert floor == pytest.approx(np.mean(drawn), abs=0.01)
    assert means([[1, 1]], [0.5, 0.5])[1] == pytest.approx(0.25)  # 2 of 4 outcomes are all alike
    assert np.isnan(distance_by_prompt([[0, 0]], target)).all()
    own = distance_by_prompt([[1, 3], [3, 1]], [[0.25, 0.75], [0.5, 0.5]])
    assert own[0] == pytest.approx([0, 0.25])
    assert own[1] == pytest.approx([distance_by_prompt([[2, 2]], row)[1][0] for row in ([0.25, 0.75], [0.5, 0.5])])


def test_target_distance_is_scipys() -> None:
    counts, target = [6, 3, 1], [0.25, 0.25, 0.5]
    found = target_distance(counts, target)
    assert found["kullback_leibler"] == pytest.approx(entropy([0.6, 0.3, 0.1], target))
    assert found["total_variation"] == pytest.approx((0.35 + 0.05 + 0.4) / 2)
    assert target_distance([5, 5], [0.5, 0.5]) == {"total_variation": 0, "kullback_leibler": 0}
    assert target_distance([4, 0], [1.0, 0.0]) == {"total_variation": 0, "kullback_leibler": 0}
    assert target_distance([4, 1], [1.0, 0.0])["kullback_leibler"] == float("inf")
    assert np.isnan(target_distance([0, 0], [0.5, 0.5])["total_variation"])


@pytest.mark.parametrize("target", [None, [0.2, 0.8]])
def test_swap_test_by_brute_force(target: list[float] | None) -> None:
    """All ways to swap the pairs of two prompts; the third class is no face."""
    pairs = np.array([[[2, 3, 0], [1, 2, 1], [0, 0, 0]], [[0, 2, 1], [0, 3, 0], [0, 1, 0]]])
    moves = [(p, i, j) for p, i, j in np.argwhere(pairs) if i != j for _ in range(pairs[p, i, j])]
    share = None if target is None else np.array(target)

    def statistic(swapped: tuple[bool, ...]) -> float:
        table = pairs.copy()
        for (p, i, j), swap in zip(moves, swapped, strict=True):
            if swap:
                table[p, i, j] -= 1
                table[p, j, i] += 1
        return sum(unfairness(of.sum(0)[:2], share) - unfairness(of.sum(1)[:2], share) for of in table)

    observed = statistic((False,) * len(moves))
    ways = [abs(statistic(swapped)) >= abs(observed) - 1e-9 for swapped in product((False, True), repeat=len(moves))]
    assert swap_test(pairs, target, 20_000) == pytest.approx(np.mean(ways), abs=0.015)


def test_swap_test_at_its_ends() -> None:
    assert swap_test([[[5, 0, 0], [0, 5, 0], [0, 0, 0]]]) == 1  # nothing changed
    changed = [[[20, 0, 0], [20, 0, 0], [0, 0, 0]]] * 3
    assert swap_test(changed) == pytest.approx(1 / 2001)
    for faceless in (
        [[0, 0, 0], [0, 0, 0], [0, 0, 3]],
        [[0, 0, 0], [0, 0, 0], [3, 0, 0]],  # before
        [[0, 0, 3], [0, 0, 0], [0, 0, 0]],  # after
    ):
        assert np.isnan(swap_test([faceless]))
        assert swap_test([faceless, *changed]) == swap_test(changed)


def test_swap_test_sees_small_changes_of_pairs_and_few_where_there_are_none() -> None:
    random = np.random.default_rng(0)

    def audit(kept: float, to_men: float, seed: int) -> tuple[float, float]:
        """25 prompts of 48 images, of which some are drawn anew, from the same law or with fewer women."""
        share = random.beta(1, 1, size=25)
        before = random.random((25, 48)) < share[:, None]
        anew = random.random((25, 48)) < (share * (1 - to_men))[:, None]
        after = np.where(random.random((25, 48)) < kept, before, anew)
        pairs = np.zeros((25, 3, 3), dtype=int)
        for p in range(25):
            np.add.at(pairs[p], (before[p].astype(int), after[p].astype(int)), 1)
        counts = [np.stack([48 - side.sum(1), side.sum(1)], 1) for side in (before, after)]
        return swap_test(pairs, None, 200, seed), permutation_test(*counts, None, 200, seed)

    null = np.array([audit(0.8, 0.0, seed) for seed in range(60)])
    harm = np.array([audit(0.8, 0.8, seed) for seed in range(60)])
    assert np.mean(null[:, 0] <= 0.05) <= 0.15
    assert np.mean(harm[:, 0] <= 0.05) >= np.mean(harm[:, 1] <= 0.05)
