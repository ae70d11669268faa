"""The measurements in benchmarks/: the authors' step and ours have the same gradient, and the counts are those of a
step by hand."""

import argparse

import numpy as np
import pytest
import torch
from scipy.stats import multinomial

from fairness_dft.transport import enumerate_counts, mean_assignment, transport_cost

WAYS = ("authors", "exact, cold", "exact, warm", "exact, activations kept, warm", "1 of 2 steps, warm")


@pytest.fixture(scope="module")
def compared():
    from benchmarks import step

    scale = step.Scale("miniature", 64, images=4, micro_batch=2, sampling_batch=4, steps=2, guidance_scale=1.75)
    ways = {name: way for name, way in step.ways(scale).items() if name in WAYS}
    torch.manual_seed(0)
    step.measure(
        scale, ways, argparse.Namespace(only=None, rounds=1, no_count=False, weights="float32", precision="32")
    )
    return ways


@pytest.mark.slow
def test_the_exact_step_has_the_authors_gradient(compared) -> None:
    assert compared["authors"].gradient.norm() > 0
    for name in WAYS[1:4]:
        assert compared[name].cosine > 0.9999 and compared[name].difference < 1e-4
    assert compared["1 of 2 steps, warm"].difference > 1e-2


@pytest.mark.slow
def test_operations_saved_are_whole_sampling_passes(compared) -> None:
    operations = {name: way.operations for name, way in compared.items()}
    # Decoder and feature networks are counted too, so that a pass costs more than the denoising network's 1.
    a_pass = operations["exact, cold"] - operations["exact, warm"]
    assert 1 < a_pass < 2.5
    again = operations["exact, warm"] - operations["exact, activations kept, warm"]
    assert again == pytest.approx(a_pass, rel=0.05)
    assert operations["authors"] > operations["exact, cold"] + 1


def test_the_authors_targets_are_ours_but_for_what_they_leave_out() -> None:
    from benchmarks.transport import authors_assignment

    probabilities = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).softmax(1).double().numpy()
    cost, shares = transport_cost(probabilities), np.full(4, 0.25)
    counts = enumerate_counts(6, 4)
    exact = mean_assignment(cost, counts, multinomial.pmf(counts, 6, shares))
    found = authors_assignment(cost, shares, seed=0)
    assert 0 < np.abs(found - exact).max() < 0.05
