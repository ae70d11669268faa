"""The report on a trained classifier: the figures of each head, and the model card.

References:
    Model Cards for Model Reporting (Mitchell et al., 2019), https://arxiv.org/abs/1810.03993
"""

from collections.abc import Mapping
from typing import Any

from fairness_dft.datasets.base import SPLITS

MANY = 20  # classes; for a head with more, tables show only the class with the lowest recall


def share_text(value: float | None) -> str:
    """Return a share with three digits, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def table(figures: Mapping[str, Any]) -> str:
    """Return a Markdown table: for each head its balanced accuracy, the recall of each class, and calibration."""
    lines = [
        f"| head | balanced accuracy ({figures['split']}) | recall of each class | calibration error before → after |",
        "|---|---|---|---|",
    ]
    for head, values in figures["heads"].items():
        recall = ", ".join(f"{name} {share_text(value)}" for name, value in values["recall"].items())
        if len(values["recall"]) > MANY:
            known = [(value, name) for name, value in values["recall"].items() if value is not None]
            least = f"lowest {share_text(min(known)[0])} ({min(known)[1]})" if known else "–"
            recall = f"{len(values['recall'])} classes, {least}"
        error = f"{share_text(figures['calibration_error_before'][head])} → {share_text(values['calibration_error'])}"
        lines.append(f"| {head} | {share_text(values['balanced_accuracy'])} | {recall} | {error} |")
    return "\n".join(lines)


def model_card(
    network: str, backbone: str | None, data: str, settings: Mapping[str, Any], figures: Mapping[str, Any]
) -> str:
    """Return the model card: what the classifier is, its training data, its accuracy, and its limits.

    Args:
        network: Name of the class of the network.
        backbone: The pretrained network it started from; None for random weights.
        data: Name of the data set.
        settings: Settings of the data set and the training, by name.
        figures: The content of metrics.json, as `train_classifier` writes it.
    """
    confusions = []
    for head, values in figures["heads"].items():
        classes = list(values["recall"])
        if len(classes) > MANY:
            continue
        rows = [
            f"| {name} | {' | '.join(map(str, row))} |" for name, row in zip(classes, values["confusion"], strict=True)
        ]
        header = [f"| {head}: label ↓ prediction → | {' | '.join(classes)} |", "|---" * (len(classes) + 1) + "|"]
        confusions.append("\n".join([*header, *rows]))
    counts = ", ".join(f"{figures['pictures'][name]} {name}" for name in SPLITS)
    start = f"`{backbone}`" if backbone else "random weights"
    seen = {
        "test": "which training did not use",
        "validation": "**which also selected the best step and the temperatures**, so these figures are optimistic",
    }
    return f"""---
library_name: transformers
pipeline_tag: image-classification
---

# Attribute classifier: {", ".join(figures["heads"])}

{network} from {start}, trained by fairness_dft on {data} ({counts} images). Labels have the form `head/class`.

It predicts **perceived** attributes, as annotators labeled images. It says nothing about any person's identity, and its
classes are a simplification. It is meant for measuring and aligning sets of generated images; it must not be used to
classify people. The license of the data set restricts its use.

## Figures

On the {figures["split"]} split, {seen[figures["split"]]}:

{table(figures)}

Balanced accuracy is the mean recall over classes. The logits of each head are divided by a temperature fitted on the
validation split ({", ".join(f"{head} {value:.2f}" for head, value in figures["temperature"].items())}); calibration
error is the expected calibration error in 15 bins, without balancing the classes.

{(chr(10) * 2).join(confusions)}

## Settings

{chr(10).join(f"- {name}: {value}" for name, value in settings.items())}
"""
