"""Bias against pairs, floors and intervals against Monte Carlo, the metric against itself in pieces."""

import json
import math
from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
import pytest
import torch
from scipy.stats import multinomial
from torchmetrics import MeanMetric

from fairness_dft.metrics.bias import (
    BiasSummary,
    bootstrap_interval,
    class_bias,
    finite_sample_floor,
    frequency_drift,
    summarize_bias,
)
from fairness_dft.metrics.fairness_metric import FairnessMetric, PairMetric


def observe(metric: FairnessMetric, batches: Sequence[tuple[int, torch.Tensor, torch.Tensor]]) -> BiasSummary:
    for prompt_index, classes, face in batches:
        metric.update(prompt_index, classes, face)
    return metric.compute()


@pytest.fixture
def batches() -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = [5, 1, 0, 7, 12, 3]
    return [
        (i % 4, torch.randint(3, (n,), generator=generator), torch.rand(n, generator=generator) < 0.8)
        for i, n in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("frequencies", "bias"),
    [
        ([0.5, 0.5], 0.0),
        ([0.9, 0.1], 0.8),
        ([0.0, 1.0], 1.0),
        ([0.25, 0.25, 0.25, 0.25], 0.0),
        ([1.0, 0.0, 0.0, 0.0], 0.5),
        ([0.2, 0.5, 0.3], 0.2),
    ],
)
def test_bias_by_hand(frequencies: list[float], bias: float) -> None:
    torch.testing.assert_close(class_bias(torch.tensor(frequencies)), torch.tensor(bias))


@pytest.mark.parametrize("classes", [2, 3, 4, 8, 16])
def test_bias_is_the_mean_over_pairs(classes: int) -> None:
    frequencies = torch.rand(5, 2, classes, dtype=torch.float64).softmax(dim=-1)
    pairs = [(frequencies[..., i] - frequencies[..., j]).abs() for i, j in combinations(range(classes), 2)]
    torch.testing.assert_close(class_bias(frequencies), torch.stack(pairs).mean(dim=0))


@pytest.mark.parametrize(("images", "classes"), [(1, 2), (2, 2), (7, 2), (24, 2), (5, 3), (1, 4), (80, 4)])
def test_floor_equals_monte_carlo(images: int, classes: int) -> None:
    counts = np.random.default_rng(0).multinomial(images, [1 / classes] * classes, size=100_000)
    simulated = class_bias(torch.from_numpy(counts) / images)
    error = float(simulated.std()) / math.sqrt(len(simulated))
    assert abs(float(finite_sample_floor(images, classes)) - float(simulated.mean())) <= 5 * error + 1e-6


@pytest.mark.parametrize(("images", "classes", "floor"), [(60, 2, 0.10), (24, 2, 0.16), (80, 4, 0.06), (160, 8, 0.03)])
def test_floors_of_the_paper_s_audits(images: int, classes: int, floor: float) -> None:
    assert round(float(finite_sample_floor(images, classes)), 2) == floor


def test_floor_by_hand() -> None:
    """One image is always wholly on one side; two images are half the time."""
    floors = finite_sample_floor(torch.tensor([[0, 1], [2, 1]]), 2)
    expected = torch.tensor([[math.nan, 1.0], [0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(floors, expected, equal_nan=True)


def test_floor_approaches_the_normal_limit() -> None:
    expected = torch.tensor(math.sqrt(2 / math.pi) * math.sqrt(2 / 4 / 100_000), dtype=torch.float64)
    torch.testing.assert_close(finite_sample_floor(100_000, 4), expected, rtol=1e-4, atol=0)


def simulate_coverage(shares: np.ndarray, images: int, prompts: int, repetitions: int = 150) -> float:
    """How often the interval of an audit holds the mean bias of all audits.

    Args:
        shares: the true class probabilities of the kinds of prompt, with shape (kinds, K), equally likely.
        images: the number of images per prompt.
        prompts: the number of prompts of an audit.
        repetitions: the number of audits.
    """
    generator = np.random.default_rng(0)
    many = generator.multinomial(images, shares, size=(20_000, len(shares)))
    truth = float(class_bias(torch.from_numpy(many) / images).mean())
    hits = 0
    for _ in range(repetitions):
        kinds = generator.integers(len(shares), size=prompts)
        counts = torch.from_numpy(generator.multinomial(images, shares[kinds]))
        low, high = bootstrap_interval(counts, draws=300)
        hits += low <= truth <= high
    return hits / repetitions


@pytest.mark.parametrize(("prompts", "images"), [(10, 24), (25, 48)])
@pytest.mark.parametrize(
    "shares",
    [
        np.array([[0.5, 0.5]]),
        np.array([[0.85, 0.15], [0.15, 0.85], [0.7, 0.3], [0.5, 0.5]]),
        np.array([[0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.6, 0.2]]),
    ],
    ids=["fair", "gender", "race"],
)
def test_interval_covers_the_expected_bias(shares: np.ndarray, prompts: int, images: int) -> None:
    """95 % within the Monte-Carlo error of 150 audits (three standard errors are 5 %)."""
    assert 0.89 <= simulate_coverage(shares, images, prompts) <= 0.999


def test_interval_of_one_prompt_covers_the_images() -> None:
    assert 0.89 <= simulate_coverage(np.array([[0.7, 0.3]]), images=60, prompts=1) <= 1


def test_interval_holds_the_estimate_and_repeats() -> None:
    counts = torch.tensor([[20, 4], [3, 21], [12, 12], [15, 9]])
    low, high = bootstrap_interval(counts)
    assert 0 <= low < float(class_bias(counts / 24).mean()) < high <= 1
    assert bootstrap_interval(counts) == (low, high)
    assert bootstrap_interval(counts, seed=1) != (low, high)
    narrow_low, narrow_high = bootstrap_interval(counts, level=0.5)
    assert low < narrow_low < narrow_high < high


def test_interval_leaves_out_prompts_no_faces() -> None:
    counts = torch.tensor([[20, 4], [3, 21], [12, 12]])
    assert bootstrap_interval(torch.cat([counts, torch.zeros(2, 2, dtype=torch.int64)])) == bootstrap_interval(counts)
    assert all(math.isnan(end) for end in bootstrap_interval(torch.zeros(3, 2)))
    assert all(math.isnan(end) for end in bootstrap_interval(torch.zeros(0, 2)))


def test_interval_without_any_variation_is_a_point() -> None:
    low, high = bootstrap_interval(torch.tensor([[24, 0, 0], [0, 24, 0]]))
    assert low == pytest.approx(2 / 3)
    assert high == pytest.approx(2 / 3)


def test_drift_by_hand() -> None:
    drift = frequency_drift(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.3, 0.3]))
    assert drift == pytest.approx(0.1)
    assert frequency_drift(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 1
    assert frequency_drift(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5])) == 0


def test_summary_by_hand() -> None:
    """Prompt 0: 3 of 4 in class "b"; prompt 1: one of each; prompt 2: no face; prompt 3: never seen."""
    summary = observe(
        FairnessMetric(("a", "b"), prompts=4),
        [
            (0, torch.tensor([1, 1, 0]), torch.tensor([True, True, True])),
            (0, torch.tensor([1, 99]), torch.tensor([True, False])),
            (1, torch.tensor([0, 1]), torch.tensor([True, True])),
            (2, torch.tensor([0, 0, -1]), torch.tensor([False, False, False])),
        ],
    )
    assert summary.classes == ("a", "b")
    assert summary.frequencies == pytest.approx((2 / 6, 4 / 6))
    assert summary.bias == pytest.approx(0.25)
    assert summary.spread == pytest.approx(0.25)
    assert summary.floor == pytest.approx((0.375 + 0.5) / 2)
    assert (summary.low, summary.high) == bootstrap_interval(torch.tensor([[1, 3], [1, 1]]))
    assert (summary.images, summary.no_face_images) == (10, 4)
    assert (summary.prompts, summary.prompts_no_face) == (2, 1)
    assert summary.per_prompt == pytest.approx((0.5, 0.0, math.nan, math.nan), nan_ok=True)


def test_summary_is_not_rounded() -> None:
    """In half precision a third would be wrong in its fourth digit, and 70,000 infinite."""
    summary = summarize_bias(torch.tensor([[2, 1], [70_000, 35_000]]), torch.tensor([0, 0]), ("a", "b"))
    assert summary.per_prompt == pytest.approx((1 / 3, 1 / 3)) and summary.bias == pytest.approx(1 / 3)
    assert summary.frequencies == pytest.approx((2 / 3, 1 / 3))


def test_summary_survives_json() -> None:
    summary = summarize_bias(torch.tensor([[1, 3], [0, 0]]), torch.tensor([0, 2]), ("a", "b"))
    values = json.loads(json.dumps(summary.as_dict(), allow_nan=False))
    assert values["counts"] == [[1, 3], [0, 0]] and values["no_face"] == [0, 2]
    assert values["bias"] == 0.5
    assert values["classes"] == ["a", "b"]
    assert values["per_prompt"] == [0.5, None]
    assert values["prompts_no_face"] == 1


def test_no_face_anywhere() -> None:
    summary = observe(
        FairnessMetric(("a", "b"), prompts=2), [(0, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool))]
    )
    for value in (
        summary.bias,
        summary.spread,
        summary.floor,
        summary.low,
        summary.high,
        *summary.frequencies,
    ):
        assert math.isnan(value)
    assert (summary.images, summary.no_face_images, summary.prompts, summary.prompts_no_face) == (
        2,
        2,
        0,
        1,
    )
    assert summary.as_dict()["bias"] is None


@pytest.mark.parametrize("split", [1, 3, 5])
def test_merged_metrics_equal_one(batches: list, split: int) -> None:
    whole = FairnessMetric(("a", "b", "c"), prompts=4)
    first, second = (FairnessMetric(("a", "b", "c"), prompts=4) for _ in range(2))
    expected = observe(whole, batches).as_dict()
    for metric, part in ((first, batches[:split]), (second, batches[split:])):
        for batch in part:
            metric.update(*batch)
    first.merge_state(second)
    assert first.compute().as_dict() == expected


def test_ranks_sum_to_one_metric(batches: list) -> None:
    """Every rank sees the same batches: torchmetrics' own gather and reduction must double the counts."""
    metric = FairnessMetric(("a", "b", "c"), prompts=4)
    metric.dist_sync_fn = lambda state, group=None: [state, state]
    metric.distributed_available_fn = lambda: True
    twice = observe(FairnessMetric(("a", "b", "c"), prompts=4), batches + batches)
    assert observe(metric, batches).as_dict() == twice.as_dict()


def test_order_and_batching_do_not_matter(batches: list) -> None:
    singles = [(i, c[k : k + 1], f[k : k + 1]) for i, c, f in reversed(batches) for k in range(len(c))]
    expected = observe(FairnessMetric(("a", "b", "c"), prompts=4), batches)
    assert observe(FairnessMetric(("a", "b", "c"), prompts=4), singles).as_dict() == expected.as_dict()


def test_reset_forgets(batches: list) -> None:
    metric = FairnessMetric(("a", "b", "c"), prompts=4)
    first = observe(metric, batches)
    metric.reset()
    assert not metric.counts.any()
    assert not metric.no_face.any()
    assert observe(metric, batches).as_dict() == first.as_dict()


def test_forward_gives_the_batch_and_accumulates(batches: list) -> None:
    metric = FairnessMetric(("a", "b", "c"), prompts=4)
    metric.update(*batches[0])
    batch = metric(*batches[3])
    alone = observe(FairnessMetric(("a", "b", "c"), prompts=4), [batches[3]])
    assert batch.as_dict() == alone.as_dict()
    both = observe(FairnessMetric(("a", "b", "c"), prompts=4), [batches[0], batches[3]])
    assert metric.compute().as_dict() == both.as_dict()


def test_pairs_by_hand() -> None:
    """A row is what was seen before, a column what was seen after; the last of either is no face."""
    metric, every = PairMetric(2, prompts=2), torch.ones(3, dtype=torch.bool)
    metric.update(1, torch.tensor([0, 0, 1]), every, torch.tensor([1, 1, 1]), every)
    metric.update(
        1, torch.tensor([1, 0]), torch.tensor([True, False]), torch.tensor([0, 0]), torch.tensor([False, True])
    )
    assert metric.compute().tolist() == [[[0] * 3] * 3, [[0, 2, 0], [0, 1, 1], [1, 0, 0]]]


def test_similarities_are_averaged_by_the_library() -> None:
    """What CLIP-T, CLIP-I and DINO rely on: a mean over items, not over batches, and NaN for none."""
    metric = MeanMetric()
    metric.update(torch.zeros(0))
    assert math.isnan(metric.compute())
    metric.update(torch.tensor([0.2, 0.4, 0.6]))
    metric.update(torch.tensor([1.0]))
    torch.testing.assert_close(metric.compute(), torch.tensor(0.55))


def test_bias_of_one_class_is_refused() -> None:
    for call in (
        lambda: class_bias(torch.ones(3, 1)),
        lambda: finite_sample_floor(5, 1),
        lambda: bootstrap_interval(torch.ones(3, 1)),
        lambda: FairnessMetric(("a",), prompts=3),
    ):
        with pytest.raises(ValueError, match="`classes` must be at least 2 for a bias between them, but got 1"):
            call()


def test_negative_images_are_refused() -> None:
    with pytest.raises(ValueError, match="`images` must not be negative, but got"):
        finite_sample_floor(torch.tensor([3, -1]), 2)


@pytest.mark.parametrize("counts", [torch.ones(3), torch.tensor([[1, -1]])])
def test_bad_counts_are_refused(counts: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="`counts` must be non-negative with shape"):
        bootstrap_interval(counts)


@pytest.mark.parametrize("options", [{"level": 0.0}, {"level": 1.0}, {"level": 95}, {"draws": 0}])
def test_bad_bootstrap_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"`level` must be in \(0, 1\) and `draws` at least 1"):
        bootstrap_interval(torch.ones(3, 2), **options)


def test_drift_of_different_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="`before` and `after` must have the same shape"):
        frequency_drift(torch.ones(2) / 2, torch.ones(4) / 4)


def test_metric_without_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="`prompts` must be at least 1, but got 0"):
        FairnessMetric(("a", "b"), prompts=0)


@pytest.mark.parametrize("prompt_index", [-1, 3])
def test_unknown_prompts_are_refused(prompt_index: int) -> None:
    with pytest.raises(ValueError, match=r"`prompt_index` must be in \[0, 3\), but got"):
        FairnessMetric(("a", "b"), prompts=3).update(prompt_index, torch.zeros(1), torch.ones(1) > 0)


@pytest.mark.parametrize(
    ("classes", "face"),
    [
        (torch.zeros(2, dtype=torch.int64), torch.ones(3, dtype=torch.bool)),
        (torch.zeros(2, dtype=torch.int64), torch.ones(2)),
        (torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(classes: torch.Tensor, face: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="`classes` and `face` must have the same shape"):
        FairnessMetric(("a", "b"), prompts=3).update(0, classes, face)


@pytest.mark.parametrize("value", [-1, 2])
def test_unknown_classes_are_refused(value: int) -> None:
    metric = FairnessMetric(("a", "b"), prompts=3)
    with pytest.raises(ValueError, match=r"`classes` must be in \[0, 2\) where there is a face, but got"):
        metric.update(0, torch.tensor([0, value]), torch.tensor([True, True]))
    assert not metric.counts.any()


@pytest.mark.parametrize(("images", "classes"), [(1, 2), (7, 2), (4, 3), (5, 4)])
def test_chance_adds_at_most_the_floor(images: int, classes: int) -> None:
    """What an unfair model scores on average, less what it would with endless images, by enumeration."""
    random = np.random.default_rng(images)
    outcomes = [c for c in product(range(images + 1), repeat=classes) if sum(c) == images]
    scores = class_bias(torch.tensor(outcomes) / images).numpy()
    for p in random.dirichlet(np.full(classes, 0.7), size=200):
        expected = multinomial(images, p).pmf(outcomes) @ scores
        added = expected - float(class_bias(torch.tensor(p)))
        assert -1e-6 <= added <= float(finite_sample_floor(images, classes)) + 1e-6


def test_interval_of_a_distance_is_around_it() -> None:
    """Of two classes and an equal target, the distance is half the bias."""
    counts = torch.tensor([[20, 4], [3, 21], [12, 12], [15, 9]])
    even = torch.full((4, 2), 0.5)
    low, high = bootstrap_interval(counts, target=even)
    assert (2 * low, 2 * high) == pytest.approx(bootstrap_interval(counts))
    own = torch.tensor([[0.8, 0.2], [0.1, 0.9], [0.5, 0.5], [0.6, 0.4]])
    low, high = bootstrap_interval(counts, target=own)
    assert low <= float(((counts / 24 - own).abs().sum(1) / 2).mean()) <= high < 0.2
