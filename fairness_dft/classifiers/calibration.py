"""How good a classifier is, head by head, and the temperature that makes its probabilities honest."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from fairness_dft.datasets.base import UNKNOWN

TEMPERATURES = (0.05, 20.0)  # the least and the highest


def head_figures(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Figures of one head over the pictures whose label is known.

    Args:
        logits: with shape (n, K).
        labels: class indices or `UNKNOWN`, int64 with shape (n,).
        classes: names of the classes.

    Returns:
        `pictures`, how many; `confusion` (rows: labels, columns: verdicts); `recall`, `precision` and `f1` of each
        class, as if all classes were equally frequent; `balanced_accuracy`, the mean recall; `accuracy`; and
        `calibration_error`, the expected calibration error in 15 bins, on the pictures as they are. All shares are in
        [0, 1]; None where there is no picture.
    """
    known = labels != UNKNOWN
    logits, labels = logits[known].float().cpu(), labels[known].cpu()
    counts = multiclass_confusion_matrix(logits, labels, len(classes)).double()
    seen = counts.sum(1) > 0
    shares = counts[seen] / counts[seen].sum(1, keepdim=True)
    recall = torch.full((len(classes),), float("nan"), dtype=torch.double)
    recall[seen] = shares[:, seen].diagonal()
    precision = recall / shares.sum(0)
    f1 = 2 * precision * recall / (precision + recall)
    error = float(multiclass_calibration_error(logits.softmax(1), labels, len(classes), 15)) if len(labels) else None
    return {
        "pictures": len(labels),
        "confusion": counts.long().tolist(),
        "recall": by_name(classes, recall),
        "precision": by_name(classes, precision),
        "f1": by_name(classes, torch.where(recall == 0, 0.0, f1)),
        "balanced_accuracy": finite(recall[seen].mean()),
        "accuracy": finite(counts.diagonal().sum() / counts.sum()),
        "calibration_error": error,
    }


def finite(value: Tensor) -> float | None:
    """A number that JSON knows."""
    return float(value) if value.isfinite() else None


def by_name(classes: Sequence[str], values: Tensor) -> dict[str, float | None]:
    """Values by the names of the classes."""
    return dict(zip(classes, map(finite, values), strict=True))


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T > 0 for which the mean cross-entropy of logits / T is least, on the pictures as they are.

    Args:
        logits: with shape (n, K).
        labels: class indices or `UNKNOWN`, int64 with shape (n,).

    Returns:
        T, within `TEMPERATURES`; 1 where no label is known, or all are right: the surer, the better they would then be.

    References:
        On Calibration of Modern Neural Networks (Guo et al., 2017), https://arxiv.org/abs/1706.04599
    """
    from scipy.optimize import minimize_scalar

    known = labels != UNKNOWN
    logits, labels = logits[known].double().cpu(), labels[known].cpu()
    if (logits.argmax(1) == labels).all():
        return 1.0
    found = minimize_scalar(
        lambda log: cross_entropy(logits * math.exp(-log), labels).item(),
        bounds=tuple(map(math.log, TEMPERATURES)),
        method="bounded",
    )
    return math.exp(found.x)


def at_a_bound(temperatures: Mapping[str, float]) -> list[str]:
    """A line for each head whose temperature ran to a bound, which means that its logits are not to be relied on."""
    low, high = TEMPERATURES
    return [
        f"the temperature of {head} ran to its bound ({value:.2f}): too few pictures of the validation split, or a "
        "classifier that has learned nothing; --model.calibrated false leaves logits as they are"
        for head, value in temperatures.items()
        if not 1.02 * low < value < 0.98 * high
    ]
