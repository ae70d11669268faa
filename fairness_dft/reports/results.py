"""results.json and the table of prompts: everything that a test or an audit measured, for programs to read."""

import csv
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from fairness_dft import __version__
from fairness_dft.attributes import attributes_of
from fairness_dft.metrics.bias import BiasSummary, Watched, bootstrap_interval, finite_sample_floor, frequency_drift
from fairness_dft.metrics.significance import (
    distance_by_prompt,
    gap_by_chance,
    gap_interval,
    permutation_test,
    swap_test,
    target_distance,
    unbiased_rms_gap,
)
from fairness_dft.prompts.files import Prompt

VERSION = 3
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft")
MODELS = ("original", "ema", "trained")
COLUMNS = (
    "prompt",
    "subject",
    "concept",
    "judge",
    "attribute",
    "model",
    "class",
    "images",
    "frequency",
    "target",
    "bias",
    "floor",
    "distance",
    "no_face",
)
SIGNIFICANT = 0.05  # p-value above which an improvement may be chance, and a share of it says nothing
Shares = Mapping[str, Mapping[str, float]]  # of each attribute, by class name


@dataclass(frozen=True)
class Measured:
    """What the monitors of a test saw.

    Attributes:
        summaries: by (judge, attribute, model), the training judge first.
        kept: means by (measure, model).
        agreement: by (judge, other judge, attribute, model), the share of images that both read alike.
        pairs: by (judge, attribute), images by their class before and after, as `PairMetric` counts them; without, the
            two models' images are not taken for pairs.
    """

    summaries: Mapping[Watched, BiasSummary]
    kept: Mapping[tuple[str, str], float] = field(default_factory=dict)
    agreement: Mapping[tuple[str, str, str, str], float] = field(default_factory=dict)
    pairs: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)


def results(
    attributes: Sequence[str],
    target: Shares,
    prompts: Sequence[Prompt],
    measured: Measured,
    run: Mapping[str, object],
    own_targets: Mapping[str, Shares] | None = None,
) -> dict[str, Any]:
    """Everything that a test measured, as JSON knows it: None for what is not known or infinite.

    A prompt that names an attribute asks for one class of it: it counts in what the attribute's frequencies of that
    prompt are, and in no mean over prompts.

    Args:
        attributes: what was aligned.
        target: the target's share of each class, of each attribute and, where there are several, of their product.
        prompts: of the test, in their order.
        measured: what was seen of them.
        run: facts of the run, such as steps, seconds and versions.
        own_targets: by text, of prompts that have another target.
    """
    targets = [(own_targets or {}).get(prompt.text, target) for prompt in prompts]
    concepts = dict.fromkeys(prompt.concept for prompt in prompts)
    every = range(len(prompts))
    rows = {concept: [i for i in every if prompts[i].concept == concept] for concept in concepts}
    bias = _figures(measured, prompts, targets, every)
    return {
        "version": VERSION,
        "attributes": list(attributes),
        "target": target,
        "own_targets": own_targets or {},
        "bias": bias,
        "concepts": {
            concept: _figures(measured, prompts, targets, rows[concept]) for concept in concepts if len(concepts) > 1
        },
        "agreement": _tree({key: _known(share) for key, share in measured.agreement.items()}),
        "prompt_adherence": _tree(prompt_adherence(measured.summaries, prompts)),
        "classifier_overfit": classifier_overfit(bias, list(target)),
        "kept": _tree({key: _known(value) for key, value in measured.kept.items()}),
        "run": {**run, "test_prompts": [prompt.text for prompt in prompts], "paired": bool(measured.pairs)},
        "note": "Attributes are perceived, as classifiers read pictures; no figure describes a person.",
    }


def classifier_overfit(bias: Mapping[str, Any], aligned: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """The share of an improvement that only the training classifier sees, which measures how far it was fooled.

    Args:
        bias: of results.json, the training judge first.
        aligned: the attributes that finetuning aimed at; of others a change is chance, and a share of it says nothing.

    Returns:
        For each other judge and aligned attribute (d - d') / d, where d and d' are the shares by which the bias fell by
        the training judge and by the other (where targets are unequal, the distance from them): 0 if both see the same,
        1 if the other sees nothing of it; None where it did not fall, or may have by chance. Shares, because a judge
        that errs more sees less bias before and after alike.
    """
    (_, first), *others = bias.items()
    found: dict[str, dict[str, float | None]] = {}
    for judge, seen in others:
        for name in [name for name in seen if name in aligned and "ema" in seen[name] and name in first]:
            own, other = _fell(first[name]), _fell(seen[name])
            p = first[name]["p_value"]
            clear = own is not None and other is not None and own > 0 and p is not None and p < SIGNIFICANT
            found.setdefault(judge, {})[name] = (own - other) / own if clear else None
    return found


def _fell(models: Mapping[str, Any]) -> float | None:
    """The share by which a model became fairer, by the measure that its targets ask for."""
    before, after = (
        side["bias"] if models["measure"] == "bias" else side["distance"]["total_variation_by_prompt"]
        for side in (models["original"], models["ema"])
    )
    return None if not before or after is None else 1 - after / before


def _figures(
    measured: Measured,
    prompts: Sequence[Prompt],
    targets: Sequence[Shares],
    rows: Sequence[int],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Summaries of some prompts by judge, attribute and model.

    Each has its gap and, if aligned, its distance from the target. Beside the models, each attribute has the measure
    that its targets ask for and, of two models, the drift of its frequencies and the p-value of the change.
    """
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for (judge, name, model), whole in measured.summaries.items():
        used = [i for i in rows if not names_any(prompts[i], name)]
        summary = whole if len(used) == len(whole.counts) else whole.of(used)
        wanted = _wanted(name, summary.classes, [targets[i] for i in used])
        counts = np.reshape(summary.counts, (len(used), len(summary.classes)))
        low, high = gap_interval(counts)
        found = summary.as_dict() | {
            "above_floor": _known(summary.bias - summary.floor),
            "gap": _known(unbiased_rms_gap(counts)),
            "gap_low": _known(low),
            "gap_high": _known(high),
            "gap_by_chance": _known(gap_by_chance(counts.sum(1), len(summary.classes))),
            "prompts_naming": len(rows) - len(used),
        }
        found |= {"counts": [list(whole.counts[i]) for i in rows], "no_face": [whole.no_face[i] for i in rows]}
        found["per_prompt"] = _spread(summary.per_prompt, used, rows)
        if wanted is not None:
            found["distance"] = distances(counts, wanted)
            found["distance"]["per_prompt"] = _spread(found["distance"]["per_prompt"], used, rows)
        models = figures.setdefault(judge, {}).setdefault(name, {})
        models[model] = found
        models["measure"] = "bias" if wanted is None or _even(wanted) else "distance"
        if (before := measured.summaries.get((judge, name, "original"))) and model == "ema":
            before = before if len(used) == len(before.counts) else before.of(used)
            drift = frequency_drift(*(torch.tensor(side.frequencies) for side in (before, summary)))
            unequal = None if models["measure"] == "bias" else wanted
            models["drift"] = _known(drift)
            if (pairs := measured.pairs.get((judge, name))) is not None:
                p = swap_test(pairs[torch.tensor(used, dtype=torch.int64)].numpy(), unequal)
            else:
                p = permutation_test(np.reshape(before.counts, counts.shape), counts, unequal)
            models["p_value"] = _known(p)
    return figures


def rows_of(content: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """The rows of a table of biases: judge, attribute and figures, without what every prompt names."""
    return [
        (judge, name, models)
        for judge, seen in content["bias"].items()
        for name, models in seen.items()
        if models["original"]["prompts_naming"] < len(models["original"]["counts"])
    ]


def no_face_share(side: Mapping[str, Any]) -> float | None:
    """The share of a model's images without a face; None of no images."""
    images = sum(map(sum, side["counts"])) + sum(side["no_face"])
    return sum(side["no_face"]) / images if images else None


def names_any(prompt: Prompt, label: str) -> bool:
    """Whether a prompt names an attribute, or one of a product's."""
    return bool(dict(prompt.names).keys() & set(attributes_of(label)))


def _wanted(name: str, classes: Sequence[str], targets: Sequence[Shares]) -> NDArray | None:
    """The target of each prompt, with shape (prompts, K); None if it is not aligned, or a judge has other classes."""
    if not targets or any(of.get(name, {}).keys() != set(classes) for of in targets):
        return None
    return np.array([[of[name][kind] for kind in classes] for of in targets])


def _even(wanted: NDArray) -> bool:
    return bool(np.allclose(wanted, 1 / wanted.shape[1]))


def _spread(values: Sequence[float | None], used: Sequence[int], rows: Sequence[int]) -> list[float | None]:
    """Values of the used rows, and None for the others."""
    of = dict(zip(used, values, strict=True))
    return [None if (value := of.get(i)) is None else _known(value) for i in rows]


def prompt_adherence(
    summaries: Mapping[Watched, BiasSummary], prompts: Sequence[Prompt]
) -> dict[Watched, dict[str, Any]]:
    """The share of images with a face that show what their prompts name, of each attribute, and of each named class."""
    found: dict[Watched, dict[str, Any]] = {}
    for (judge, name, model), summary in summaries.items():
        shown: dict[str, list[int]] = {}
        for prompt, counts in zip(prompts, summary.counts, strict=True):
            if (kind := dict(prompt.names).get(name)) in summary.classes:
                so_far = shown.setdefault(kind, [0, 0])
                so_far[0] += counts[summary.classes.index(kind)]
                so_far[1] += sum(counts)
        if shown:
            whole = _share(*(sum(column) for column in zip(*shown.values(), strict=True)))
            found[judge, name, model] = whole | {"classes": {kind: _share(*of) for kind, of in shown.items()}}
    return found


def _share(shown: int, images: int) -> dict[str, float | int | None]:
    """A share of images with its 95 % interval (Wilson's), which takes the prompts as they are."""
    if not images:
        return {"share": None, "low": None, "high": None, "images": 0}
    interval = binomtest(shown, images).proportion_ci(method="wilson")
    return {"share": shown / images, "low": float(interval.low), "high": float(interval.high), "images": images}


def _tree(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Values by their keys' parts, one level a part."""
    tree: dict[str, Any] = {}
    for (*path, last), value in flat.items():
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = value
    return tree


def distances(counts: NDArray, target: NDArray) -> dict[str, Any]:
    """How far images are from their prompts' targets: all prompts together, and each by itself.

    Together, the target is that of the prompts, each as often as it has images.

    Args:
        counts: images of each class, with shape (prompts, classes).
        target: with the same shape.
    """
    by_prompt, floors = distance_by_prompt(counts, target)
    images = counts.sum(1, keepdims=True)
    seen = images[:, 0] > 0
    together = target_distance(counts.sum(0), (images * target).sum(0) / max(images.sum(), 1))
    low, high = bootstrap_interval(torch.from_numpy(counts), target=torch.from_numpy(target))
    found = together | {
        "total_variation_by_prompt_low": low,
        "total_variation_by_prompt_high": high,
        "total_variation_by_prompt": by_prompt[seen].mean() if seen.any() else math.nan,
        "total_variation_by_prompt_floor": floors[seen].mean() if seen.any() else math.nan,
    }
    return {key: _known(float(value)) for key, value in found.items()} | {"per_prompt": by_prompt.tolist()}


def surroundings() -> dict[str, object]:
    """The machine, and the versions of what the figures depend on; a checkout need not be installed."""
    versions = {"fairness_dft": __version__} | {name: version(name) for name in PACKAGES}
    return {"machine": platform.platform(), "versions": versions}


def write_json(file: Path, content: dict[str, object]) -> None:
    """Write JSON in one piece: a reader never sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(file)


def write_csv(file: Path, content: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
    """Write what was seen of each prompt: a row for each judge, attribute, model and class.

    Args:
        file: where to.
        content: of results.json.
        prompts: in their order there.
    """
    draft = file.with_suffix(".part")
    with draft.open("w", newline="", encoding="utf-8") as opened:
        rows = csv.writer(opened)
        rows.writerow(COLUMNS)
        for judge, attributes in content["bias"].items():
            for name, models in attributes.items():
                for model in [model for model in MODELS if model in models]:
                    for index, prompt in enumerate(prompts):
                        told = class_rows(models[model], index, targets_of(content, prompt.text).get(name, {}))
                        rows.writerows([*prompt[:3], judge, name, model, *row] for row in told)
    draft.replace(file)


def class_rows(side: Mapping[str, Any], index: int, target: Mapping[str, float]) -> Iterator[list[Any]]:
    """Of one prompt and model, for each class the last of `COLUMNS`."""
    counts = side["counts"][index]
    distance = side["distance"]["per_prompt"][index] if "distance" in side else None
    bias = side["per_prompt"][index]
    floor = None if bias is None else float(finite_sample_floor(sum(counts), len(counts)))
    for kind, count in zip(side["classes"], counts, strict=True):
        share = count / sum(counts) if sum(counts) else None
        yield [kind, count, share, target.get(kind), bias, floor, distance, side["no_face"][index]]


def targets_of(content: Mapping[str, Any], prompt: str) -> Shares:
    """A prompt's target, of each aligned attribute and of their product."""
    return content["own_targets"].get(prompt, content["target"])


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
