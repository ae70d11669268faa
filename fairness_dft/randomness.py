"""Randomness without state: every draw is hashed from the run's seed and a place in the run.

A resumed run so continues exactly, ranks agree without communication, and no draw depends on how many came before it.
The hash is numpy's `SeedSequence`; the first number of a key names its stream, so that no two uses share draws.
"""

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray


class Stream(IntEnum):
    """What is drawn; the first number of a key."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2
    ORDER = 3
    NOISE_POOL = 4
    STEP = 5
    REPEATED_STEP = 6
    DIAGNOSIS = 7


def hashed_words(seed: int, key: tuple[int, ...], count: int) -> NDArray[np.uint64]:
    """Hash a seed and a key into words; the first ones do not depend on how many there are.

    Args:
        seed: the seed of the run, non-negative.
        key: the stream and the place in it, non-negative.
        count: how many words.

    Returns:
        Words, uint64 with shape (count,).

    Raises:
        ValueError: if the seed is negative.

    Example:
        >>> hashed_words(0, (Stream.TRAIN, 0, 0), 3)[:2].tolist() == hashed_words(0, (0, 0, 0), 2).tolist()
        True
    """
    return np.asarray(np.random.SeedSequence(seed, spawn_key=key).generate_state(count, np.uint64), np.uint64)


def hashed_generator(seed: int, *key: int) -> torch.Generator:
    """Return a random generator on the CPU for one place of a run.

    Args:
        seed: the seed of the run, non-negative.
        key: the stream and the place in it, non-negative.

    Example:
        >>> one, two = (hashed_generator(0, Stream.STEP, 7) for _ in range(2))
        >>> torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=two))
        True
    """
    return torch.Generator().manual_seed(int(hashed_words(seed, key, 1)[0] >> np.uint64(1)))
