"""What a trained classifier tells about itself: the figures of each head, and the model card.

References:
    Model Cards for Model Reporting (Mitchell et al., 2019), https://arxiv.org/abs/1810.03993
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from fairness_dft.labelled_faces import SPLITS, UNKNOWN

TEMPERATURES = (0.05, 20.0)  # the least and the highest
MANY = 20  # classes; of a head with more, tables name the one that is recalled least


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


def shown(value: float | None) -> str:
    """A share with three digits, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def table(figures: Mapping[str, Any]) -> str:
    """A table in Markdown: for each head its balanced accuracy, the recall of each class, and calibration."""
    lines = [
        f"| head | balanced accuracy ({figures['split']}) | recall of each class | calibration error before → after |",
        "|---|---|---|---|",
    ]
    for head, values in figures["heads"].items():
        recall = ", ".join(f"{name} {shown(value)}" for name, value in values["recall"].items())
        if len(values["recall"]) > MANY:
            known = [(value, name) for name, value in values["recall"].items() if value is not None]
            least = f"least {shown(min(known)[0])}, of {min(known)[1]}" if known else "–"
            recall = f"{len(values['recall'])} classes, {least}"
        error = f"{shown(figures['calibration_error_before'][head])} → {shown(values['calibration_error'])}"
        lines.append(f"| {head} | {shown(values['balanced_accuracy'])} | {recall} | {error} |")
    return "\n".join(lines)


def model_card(
    network: str, backbone: str | None, data: str, settings: Mapping[str, Any], figures: Mapping[str, Any]
) -> str:
    """What the classifier is, what it was trained on, how well it does, and what it must not be taken for.

    Args:
        network: name of its class.
        backbone: what it started from; None if from random weights.
        data: name of the data set.
        settings: of the data set and the training, by name.
        figures: what `train_classifier` writes into metrics.json.
    """
    confusions = []
    for head, values in figures["heads"].items():
        classes = list(values["recall"])
        if len(classes) > MANY:
            continue
        rows = [
            f"| {name} | {' | '.join(map(str, row))} |" for name, row in zip(classes, values["confusion"], strict=True)
        ]
        header = [f"| {head}: label ↓ verdict → | {' | '.join(classes)} |", "|---" * (len(classes) + 1) + "|"]
        confusions.append("\n".join([*header, *rows]))
    counts = ", ".join(f"{figures['pictures'][name]} {name}" for name in SPLITS)
    start = f"`{backbone}`" if backbone else "random weights"
    seen = {
        "test": "which training did not see",
        "validation": "**which also chose the best step and the temperatures**: these figures flatter",
    }
    return f"""---
library_name: transformers
pipeline_tag: image-classification
---

# Attribute classifier: {", ".join(figures["heads"])}

{network} from {start}, trained by fairness_dft on {data} ({counts} pictures). Labels have the form `head/class`.

It reads **perceived** attributes, as annotators labelled pictures. It says nothing about any person's identity, and its
classes are a simplification. It is meant for measuring and aligning generated images as a whole; it must not be used to
classify people. The licence of the data holds for what may be done with it.

## Figures

On the {figures["split"]} split, {seen[figures["split"]]}:

{table(figures)}

Balanced accuracy is the mean recall over classes. The logits of each head are divided by a temperature fitted on the
validation split ({", ".join(f"{head} {value:.2f}" for head, value in figures["temperature"].items())}); calibration
error is the expected one, in 15 bins, on the pictures as they are distributed over classes.

{(chr(10) * 2).join(confusions)}

## Settings

{chr(10).join(f"- {name}: {value}" for name, value in settings.items())}
"""
