"""Targets by optimal transport: the authors' way, by POT's `emd`, beside ours.

    python -m benchmarks.transport

The authors give `emd` the N images and the K classes with their drawn counts, one problem after the other: for K = 4
all class counts, from the most to the least probable, until 95 % of the probability is covered; for K = 8 and 16, which
are products of attributes, 100 random draws. Where that is too much (K = 4, N = 256) both draw. For K = 2 they use no
transport but the closed form, as we do. Errors are mean absolute differences of the expected targets q from the exact
expectation, or from a long run of draws where the counts cannot be enumerated.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ot
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import multinomial

from fairness_dft.transport import draw_counts, enumerate_counts, expected_assignment, mean_assignment, transport_cost

ATTRIBUTES = {4: (4,), 8: (2, 4), 16: (2, 4, 2)}  # classes of each; their product is K
IMAGES = (24, 32, 40, 256)
COVERED = 0.95
DRAWS = 100
LONG_RUN = 20_000


def authors_assignment(cost: np.ndarray, distribution: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """The expected assignment q as the authors compute it.

    Args:
        cost: of giving class k to image i, with shape (N, K).
        distribution: D, with shape (K,).
        generator: for the draws.

    Returns:
        q, with shape (N, K).
    """
    images, classes = cost.shape
    if classes <= 4 and images <= 40:
        counts = enumerate_counts(images, classes)
        weights = multinomial.pmf(counts, images, distribution)
        order = np.argsort(-weights)
        kept = order[: int(np.searchsorted(weights[order].cumsum(), COVERED)) + 1]
        counts, weights = counts[kept], weights[kept]
    else:
        labels = torch.multinomial(
            torch.from_numpy(distribution), DRAWS * images, replacement=True, generator=generator
        )
        counts = np.stack([np.bincount(row, minlength=classes) for row in labels.view(DRAWS, images).numpy()])
        weights = np.ones(DRAWS)
    each = np.ones(images)
    expected = np.zeros_like(cost)
    for count, weight in zip(counts, weights, strict=True):
        expected += weight * ot.emd(each, count.astype(float), cost)
    return expected / weights.sum()


def seconds(function: Callable[[], np.ndarray], least: float = 0.3) -> tuple[float, np.ndarray]:
    """The median time of a call, over at least three calls and `least` seconds, and what the last one returned."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        start = time.perf_counter()
        found = function()
        times.append(time.perf_counter() - start)
    return statistics.median(times), found


def mean_error(draw: Callable[[int], np.ndarray], reference: np.ndarray, repeats: int = 5) -> float:
    """Mean absolute difference of q from the reference, over several seeds."""
    return float(np.mean([np.abs(draw(seed) - reference).mean() for seed in range(repeats)]))


def reference_assignment(cost: np.ndarray, distribution: np.ndarray) -> np.ndarray:
    """The exact expectation where counts can be enumerated, else a long run of draws."""
    images, classes = cost.shape
    if classes <= 4 and images <= 40:
        counts = enumerate_counts(images, classes)
        return mean_assignment(cost, counts, multinomial.pmf(counts, images, distribution))
    counts, weights = draw_counts(images, distribution, LONG_RUN, seeded(999))
    return mean_assignment(cost, counts, weights)


def seeded(seed: int) -> torch.Generator:
    """A random generator."""
    return torch.Generator().manual_seed(seed)


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    table = Table("K", "N", "authors (ms)", "ours (ms)", "times faster", "authors' error", "our error")
    rows = []
    for classes, sizes in ATTRIBUTES.items():
        for images in IMAGES:
            logits = [torch.randn(images, size, generator=seeded(images + size)) * 3 for size in sizes]
            cost = transport_cost(*(values.softmax(1).double().numpy() for values in logits))
            distribution = np.full(classes, 1 / classes)
            authors = lambda seed=0: authors_assignment(cost, distribution, seeded(seed))  # noqa: B023, E731
            ours = lambda seed=0: expected_assignment(cost, distribution, generator=seeded(seed))  # noqa: B023, E731
            (theirs, _), (own, _) = seconds(authors), seconds(ours)
            reference = reference_assignment(cost, distribution)
            errors = mean_error(authors, reference), mean_error(ours, reference)
            rows.append(dict(classes=classes, images=images, authors=theirs, ours=own, errors=errors))
            figures = f"{1e3 * theirs:.2f}", f"{1e3 * own:.2f}", f"{theirs / own:.1f}"
            table.add_row(str(classes), str(images), *figures, *(f"{error:.4f}" for error in errors))
    Console(width=120).print(table)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
