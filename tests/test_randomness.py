"""Hashed randomness: reproducible, and no two places of a run share draws."""

import numpy as np
import pytest
import torch

from fairness_dft.randomness import Stream, hashed_generator, hashed_words


def test_words_are_those_of_numpys_seed_sequence_and_a_prefix_of_longer_ones():
    expected = np.random.SeedSequence(3, spawn_key=(0, 1, 2)).generate_state(5, np.uint64)
    assert hashed_words(3, (Stream.TRAIN, 1, 2), 5).tolist() == expected.tolist()
    assert hashed_words(3, (Stream.TRAIN, 1, 2), 2).tolist() == expected[:2].tolist()


def test_no_two_places_share_draws():
    places = [(seed, stream, n) for seed in range(4) for stream in Stream for n in range(4)]
    draws = {place: torch.rand(4, generator=hashed_generator(*place)).tolist() for place in places}
    assert len({tuple(draw) for draw in draws.values()}) == len(places)  # seed + n would repeat them


def test_the_same_place_draws_the_same():
    one, two = (torch.rand(9, generator=hashed_generator(7, Stream.STEP, 11)) for _ in range(2))
    assert torch.equal(one, two)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        hashed_words(-1, (0,), 1)
