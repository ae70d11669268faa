"""What a trained classifier tells about itself: the figures of each head, and the model card.

References:
    Model Cards for Model Reporting (Mitchell et al., 2019), https://arxiv.org/abs/1810.03993
"""

from collections.abc import Mapping
from typing import Any

from fairness_dft.datasets.base import SPLITS

MANY = 20  # classes; of a head with more, tables name the one that is recalled least


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
