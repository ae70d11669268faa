"""Targets by optimal transport: the authors' way, by POT's `emd`, beside ours.

    python -m benchmarks.transport

The authors give `emd` the N images and the K classes with their drawn counts, one problem after the other: for K = 4
all class counts, from the most to the least probable, until 95 % of the probability is covered; for K = 8 and 16, which
are products of attributes, 100 random draws. Where that is too much (K = 4, N = 256) both draw. For K = 2 they use no
transport but the closed form, as we do. Ours are as many draws as reach their error, and the default.
Errors are mean absolute differences of the expected targets q from the exact expectation, or from a long run of
independent draws where the counts cannot be enumerated, over twenty seeds.
"""

import argparse
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import ot
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import multinomial

from fairness_dft.alignment.assignment import hungarian_assignment
from fairness_dft.alignment.counts import enumerate_counts
from fairness_dft.alignment.transport import expected_assignment, transport_cost

ATTRIBUTES = {4: (4,), 8: (2, 4), 16: (2, 4, 2)}  # classes of each; their product is K
IMAGES = (24, 32, 40, 256)
COVERED = 0.95
DRAWS = 100
NUMBERS = range(4, 1025, 4)
LONG_RUN = 20_000
DEFAULT = inspect.signature(expected_assignment).parameters["draws"].default


def authors_assignment(cost: np.ndarray, distribution: np.ndarray, seed: int) -> np.ndarray:
    """The expected assignment q as the authors compute it.

    Args:
        cost: of giving class k to image i, with shape (N, K).
        distribution: D, with shape (K,).
        seed: of the draws.

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
            torch.from_numpy(distribution), DRAWS * images, replacement=True, generator=seeded(seed)
        )
        counts = np.stack([np.bincount(row, minlength=classes) for row in labels.view(DRAWS, images).numpy()])
        weights = np.ones(DRAWS)
    each = np.ones(images)
    expected = np.zeros_like(cost)
    for count, weight in zip(counts, weights, strict=True):
        expected += weight * ot.emd(each, count.astype(float), cost)
    return expected / weights.sum()


def our_assignment(cost: np.ndarray, distribution: np.ndarray, seed: int, draws: int) -> np.ndarray:
    """Q as we compute it where there are too many counts to enumerate."""
    return expected_assignment(cost, distribution, draws=draws, max_enumeration=0, generator=seeded(seed))


def seconds(draw: Callable[[int], np.ndarray], least: float = 0.3) -> float:
    """The median time of a call, over at least three calls and `least` seconds."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        start = time.perf_counter()
        draw(0)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def mean_error(draw: Callable[[int], np.ndarray], reference: np.ndarray, repeats: int = 20) -> float:
    """Mean absolute difference of q from the reference, over several seeds."""
    return float(np.mean([np.abs(draw(seed) - reference).mean() for seed in range(repeats)]))


def reference_assignment(cost: np.ndarray, distribution: np.ndarray) -> np.ndarray:
    """The exact expectation where counts can be enumerated, else a long run of draws, by the Hungarian algorithm."""
    images, classes = cost.shape
    if classes <= 4 and images <= 40:
        counts = enumerate_counts(images, classes)
        weights = multinomial.pmf(counts, images, distribution)
    else:
        counts = np.random.default_rng(999).multinomial(images, distribution, LONG_RUN)
        counts, weights = np.unique(counts, axis=0, return_counts=True)
    expected = np.zeros_like(cost)
    for count, weight in zip(counts, weights, strict=True):
        expected[np.arange(images), hungarian_assignment(cost, count)] += weight
    return expected / weights.sum()


def seeded(seed: int) -> torch.Generator:
    """A random generator."""
    return torch.Generator().manual_seed(seed)


def compare(classes: int, images: int) -> dict[str, float]:
    """Seconds and errors of both ways, of ours with as many draws as reach the authors' error and with the default."""
    generator = seeded(images + classes)
    logits = [torch.randn(images, size, generator=generator) * 3 for size in ATTRIBUTES[classes]]
    cost = transport_cost(*(values.softmax(1).double().numpy() for values in logits))
    distribution = np.full(classes, 1 / classes)
    authors, ours = partial(authors_assignment, cost, distribution), partial(our_assignment, cost, distribution)
    reference = reference_assignment(cost, distribution)
    error = mean_error(authors, reference)
    draws = next(n for n in NUMBERS if mean_error(partial(ours, draws=n), reference) <= error)
    found = dict(classes=classes, images=images, draws=draws, authors=seconds(authors), authors_error=error)
    for name, number in (("ours", draws), ("default", DEFAULT)):
        way = partial(ours, draws=number)
        found |= {name: seconds(way), f"{name}_error": mean_error(way, reference)}
    return found


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    columns = "authors (ms)", "error", "our draws", "(ms)", "times faster", "error", "default (ms)", "error"
    table, rows = Table("K", "N", *columns), []
    for classes, images in product(ATTRIBUTES, IMAGES):
        rows.append(compare(classes, images))
        print(rows[-1], file=sys.stderr, flush=True)
        values = {name: f"{value:.4f}" if name.endswith("_error") else value for name, value in rows[-1].items()}
        values |= {name: f"{1e3 * rows[-1][name]:.1f}" for name in ("authors", "ours", "default")}
        values["faster"] = f"{rows[-1]['authors'] / rows[-1]['ours']:.1f}"
        order = "classes images authors authors_error draws ours faster ours_error default default_error"
        table.add_row(*(str(values[name]) for name in order.split()))
    Console(width=140).print(table)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
