"""The quality of a classifier, head by head, and the temperature that calibrates its probabilities."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from fairness_dft.datasets.base import UNKNOWN

TEMPERATURES = (0.05, 20.0)  # lowest and highest


def head_figures(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Return figures of one head over the images with a known label.

    Args:
        logits: With shape (n, K).
        labels: Class indices or `UNKNOWN`, int64 with shape (n,).
        classes: Names of the classes.

    Returns:
        `pictures`, the number of images; `confusion` (rows: labels, columns: predictions); `recall`, `precision` and
        `f1` of each class, as if all classes were equally frequent; `balanced_accuracy`, the mean recall; `accuracy`;
        and `calibration_error`, the expected calibration error in 15 bins, without balancing classes. All shares are in
        [0, 1]; None where there is no image.
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
    """Return a number that JSON can express; None for NaN and infinity."""
    return float(value) if value.isfinite() else None


def by_name(classes: Sequence[str], values: Tensor) -> dict[str, float | None]:
    """Return values by the names of the classes."""
    return dict(zip(classes, map(finite, values), strict=True))


def temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T > 0 that minimizes the mean cross-entropy of logits / T.

    Args:
        logits: With shape (n, K).
        labels: Class indices or `UNKNOWN`, int64 with shape (n,).

    Returns:
        T, within `TEMPERATURES`; 1 if no label is known, or all predictions are right, for then the smallest T is best.

    References:
        On Calibration of Modern Neural Networks (Guo et al., 2017), https://arxiv.org/abs/1706.04599
    """
    from scipy.optimize import minimize_scalar

    known = labels != UNKNOWN
    logits, labels = logits[known].double().cpu(), labels[known].cpu()
    if (logits.argmax(1) == labels).all():
        return 1.0
    minimum = minimize_scalar(
        lambda log: cross_entropy(logits * math.exp(-log), labels).item(),
        bounds=tuple(map(math.log, TEMPERATURES)),
        method="bounded",
    )
    return math.exp(minimum.x)


def at_a_bound(temperatures: Mapping[str, float]) -> list[str]:
    """Return a warning for each head whose temperature reached a bound, which makes its logits unreliable."""
    low, high = TEMPERATURES
    return [
        f"the temperature of {head} reached its bound ({value:.2f}): the validation split has too few images, or the "
        "classifier has learned nothing; --model.calibrated false keeps the logits unscaled"
        for head, value in temperatures.items()
        if not 1.02 * low < value < 0.98 * high
    ]
