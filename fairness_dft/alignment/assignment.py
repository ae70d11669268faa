"""Images are given the classes that a draw has, at the least cost in all: which image becomes what.

    σ* = argmin_σ Σ_i cost_iσ(i)  over the σ that give class k to m_k images,  k = 1, ..., K

A draw enters through its class counts m. scipy's Hungarian algorithm sees it as n images and n drawn classes, and
takes time by n² and more. Where many images see the same K classes it is faster to find what the classes are worth.
If at prices v one class is the cheapest for each image, argmin_k cost_ik − v_k, and class k is it for m_k of them, then
that assignment is the optimum, and the only one: in any other with these counts the prices add up to the same, and an
image that changes its class pays more.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import linear_sum_assignment

PRICED_FROM = 64  # images; with fewer the Hungarian algorithm is about as fast or faster
DRAWS_AT_ONCE = 64  # so that what is compared stays in the processor's cache
NEVER = 1e9  # a price beyond any cost
# How far a price goes into the gap that it may lie in, from where it comes; the middle takes a few rounds more.
BEYOND = np.float32(0.8)


def optimal_assignments(cost: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the assignments of least cost for several draws.

    Where several are optimal (images with equal probabilities) the Hungarian algorithm's choice stands.

    Args:
        cost: the cost of giving class k to image i, with shape (n, K).
        counts: how many images get each class in each draw, with shape (M, K), M at least 1, rows sum to n.

    Returns:
        The class of each image in each draw, with shape (M, n), int64 in [0, K).

    Example:
        >>> cost = np.array([[0.0, 1.0], [0.4, 0.6], [1.0, 0.0]])
        >>> optimal_assignments(cost, np.array([[2, 1], [1, 2]])).tolist()
        [[0, 0, 1], [0, 1, 1]]
    """
    if len(cost) < PRICED_FROM or cost.shape[1] == 1:
        return np.array([hungarian_assignment(cost, count) for count in counts])
    blocks = np.array_split(counts, math.ceil(len(counts) / DRAWS_AT_ONCE))
    assigned = np.concatenate([priced_assignments(cost, block) for block in blocks])
    for draw in np.flatnonzero(assigned[:, 0] < 0):
        assigned[draw] = hungarian_assignment(cost, counts[draw])
    return assigned


def hungarian_assignment(cost: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the assignment of least cost for one draw, by the Hungarian algorithm.

    Args:
        cost: the cost of giving class k to image i, with shape (n, K).
        count: how many images get each class, with shape (K,), sums to n.

    Returns:
        The class of each image, with shape (n,), int64 in [0, K).
    """
    labels = np.repeat(np.arange(len(count)), count)
    assigned: np.ndarray = labels[linear_sum_assignment(cost[:, labels])[1]]
    return assigned


def priced_assignments(cost: np.ndarray, counts: np.ndarray, rounds: int = 16) -> np.ndarray:
    """Return the assignments of least cost for the draws whose class prices converge within a few rounds.

    What `class_prices` finds is put to the proof, in the precision of the cost: every class has its count, and no image
    hesitates between two. Some draws fail, such as those that must divide equal images.

    Args:
        cost: the cost of giving class k to image i, with shape (n, K), finite.
        counts: how many images get each class in each draw, with shape (M, K), rows sum to n.
        rounds: how often each class sets its price.

    Returns:
        The class of each image in each draw, with shape (M, n), int64 in [0, K), or −1 in the draws that fail.
    """
    priced = cost.T[:, None, :] - class_prices(cost, counts, rounds).T[:, :, None]
    chosen = priced == priced.min(axis=0)
    proven = (np.count_nonzero(chosen, axis=2) == counts.T).all(axis=0)
    return np.where(proven[:, None], chosen.argmax(axis=0), -1)


def class_prices(cost: np.ndarray, counts: np.ndarray, rounds: int) -> np.ndarray:
    """Prices at which the images choose the counts of each draw, or nearly, in single precision.

    The classes set their prices in turn, each between the last image that it needs and the first that it does not. That
    raises the dual objective Σ_i min_k (cost_ik − v_k) + Σ_k m_k v_k, or leaves it where it is; as that is not smooth,
    it may stall below its maximum.

    Args:
        cost: the cost of giving class k to image i, with shape (n, K), K at least 2, in magnitude far below 1e9.
        counts: how many images get each class in each draw, with shape (M, K), rows sum to n.
        rounds: how often each class sets its price.

    Returns:
        The price v of each class in each draw, with shape (M, K), float32.

    Reference:
        The auction algorithm: a distributed relaxation method for the assignment problem (Bertsekas, 1988), where
        images bid for classes, https://doi.org/10.1007/BF02186476
    """
    images, classes = cost.shape
    by_class = np.ascontiguousarray(cost.T, dtype=np.float32)[:, None, :]
    found = np.zeros((classes, len(counts)), dtype=np.float32)
    draws = np.arange(len(counts))  # that are not settled
    for _ in range(rounds):
        wanted, prices, rows = counts[draws].T, found[:, draws], np.arange(len(draws))
        priced = by_class - prices[:, :, None]
        later = np.full((classes + 1, len(draws), images), np.inf, dtype=np.float32)
        for k in range(classes - 1, 0, -1):
            np.minimum(later[k + 1], priced[k], out=later[k])  # the best of the classes from k on
        best = later[classes]  # of the classes before k, at their new prices
        edges = np.empty((len(draws), images + 2), dtype=np.float32)
        edges[:, 0], edges[:, -1] = -NEVER, NEVER
        for k in range(classes):
            edges[:, 1:-1] = by_class[k] - np.minimum(best, later[k + 1])
            edges[:, 1:-1].sort(axis=1)
            last, first = edges[rows, wanted[k]], edges[rows, wanted[k] + 1]
            prices[k] = last + np.where(prices[k] < last, BEYOND, 1 - BEYOND) * (first - last)
            priced[k] = by_class[k] - prices[k, :, None]
            best = np.minimum(best, priced[k])
        found[:, draws] = prices
        draws = draws[(np.count_nonzero(priced == best, axis=2) != wanted).any(axis=0)]
        if len(draws) == 0:
            break
    return found.T
