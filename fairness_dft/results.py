"""results.json and the table of prompts: everything that a test or an audit measured, for programs to read."""

import csv
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fairness_dft import __version__
from fairness_dft.metrics import BiasSummary, Watched, frequency_drift
from fairness_dft.prompt_files import Prompt
from fairness_dft.significance import (
    distance_by_prompt,
    gap_by_chance,
    gap_interval,
    gap_without_chance,
    permutation_test,
    target_distance,
)

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
    "bias",
    "faceless",
)


def results(
    attributes: Sequence[str],
    target: dict[str, dict[str, float]],
    summaries: dict[Watched, BiasSummary],
    kept: dict[tuple[str, str], float],
    run: dict[str, object],
    concepts: Mapping[str, dict[Watched, BiasSummary]] | None = None,
    agreement: Mapping[tuple[str, str, str, str], float] | None = None,
    obedience: Mapping[Watched, float] | None = None,
) -> dict[str, object]:
    """Everything that a test measured, as JSON knows it: None for what is not known or infinite.

    Args:
        attributes: what was aligned.
        target: the target distribution by class name, of each attribute and, where there are several, of their
            product. Where some prompts have targets of their own (`other_targets` of the run), no distance is told.
        summaries: by (judge, attribute, model).
        kept: means by (measure, model).
        run: facts of the run, such as steps, seconds, prompts and versions.
        concepts: by concept and (judge, attribute, model), for prompts of several concepts.
        agreement: by (judge, other judge, attribute, model), the share of images that both read alike.
        obedience: by (judge, attribute, model), the share of images that show what their prompts name.
    """
    wanted = {} if run.get("other_targets") else target
    alike: dict[str, dict[str, dict[str, dict[str, float | None]]]] = {}
    for (judge, other, name, model), share in (agreement or {}).items():
        alike.setdefault(judge, {}).setdefault(other, {}).setdefault(name, {})[model] = _known(share)
    obeyed: dict[str, dict[str, dict[str, float | None]]] = {}
    for (judge, name, model), share in (obedience or {}).items():
        obeyed.setdefault(judge, {}).setdefault(name, {})[model] = _known(share)
    measures: dict[str, dict[str, float]] = {}
    for (measure, model), value in kept.items():
        measures.setdefault(measure, {})[model] = _known(value)
    return {
        "version": 2,
        "attributes": list(attributes),
        "target": target,
        "bias": _nested(summaries, wanted),
        "concepts": {concept: _nested(found, wanted) for concept, found in (concepts or {}).items()},
        "agreement": alike,
        "obedience": obeyed,
        "only_training": only_training(summaries, tuple(target)),
        "kept": measures,
        "run": run,
        "note": "Attributes are perceived, as classifiers read pictures; no figure describes a person.",
    }


def only_training(
    summaries: Mapping[Watched, BiasSummary], aligned: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """The share of an improvement that only the training classifier sees, which measures how far it was fooled.

    Args:
        summaries: by (judge, attribute, model), the training judge first.
        aligned: the attributes that finetuning aimed at; of others a change is chance, and a share of it says nothing.

    Returns:
        For each other judge and aligned attribute (d - d') / d, where d and d' are by how much the bias fell by the
        training judge and by the other: 0 if both see the same, 1 if the other sees nothing of it; None where it did
        not fall.
    """
    fell = {
        (judge, name): before.bias - summaries[judge, name, "ema"].bias
        for (judge, name, model), before in summaries.items()
        if model == "original" and name in aligned and (judge, name, "ema") in summaries
    }
    first = next((judge for judge, _ in fell), None)
    found: dict[str, dict[str, float | None]] = {}
    for (judge, name), other in fell.items():
        own = fell.get((first, name), 0.0)
        if judge != first:
            found.setdefault(judge, {})[name] = _known((own - other) / own) if own > 0 else None
    return found


def _nested(
    summaries: Mapping[Watched, BiasSummary], target: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, dict[str, object]]]:
    """Summaries by judge, attribute and model, each with its gap and, if aligned, its distance from the target.

    Beside the models, each attribute has the drift of its frequencies and the p-value of the change of its bias.
    """
    bias: dict[str, dict[str, dict[str, object]]] = {}
    for (judge, name, model), summary in summaries.items():
        images = [sum(counts) for counts in summary.counts]
        low, high = gap_interval(summary.counts)
        figures = summary.as_dict() | {
            "gap": _known(gap_without_chance(summary.counts)),
            "gap_low": _known(low),
            "gap_high": _known(high),
            "gap_by_chance": _known(gap_by_chance(images, len(summary.classes))),
        }
        if target.get(name, {}).keys() == set(summary.classes):
            wanted = [target[name][kind] for kind in summary.classes]
            figures["distance"] = distances(summary.counts, wanted)
        bias.setdefault(judge, {}).setdefault(name, {})[model] = figures
    for judge, seen in bias.items():
        for name, models in seen.items():
            pair = [summaries.get((judge, name, model)) for model in ("original", "ema")]
            if all(pair):
                drift = frequency_drift(*(torch.tensor(summary.frequencies) for summary in pair))
                models["drift"] = _known(drift)
                models["p_value"] = _known(permutation_test(pair[0].counts, pair[1].counts))
    return bias


def distances(counts: Sequence[Sequence[int]], target: Sequence[float]) -> dict[str, float | None]:
    """How far the images of all prompts together, and of each prompt by itself, are from a target."""
    by_prompt, floor = distance_by_prompt(counts, target)
    together = target_distance([sum(column) for column in zip(*counts, strict=True)], target)
    found = together | {"total_variation_by_prompt": by_prompt, "total_variation_by_prompt_floor": floor}
    return {key: _known(value) for key, value in found.items()}


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
                    seen = models[model]
                    of_prompts = (seen["per_prompt"], seen["counts"], seen["faceless"])
                    for prompt, bias, counts, faceless in zip(prompts, *of_prompts, strict=True):
                        for kind, count in zip(seen["classes"], counts, strict=True):
                            share = count / sum(counts) if sum(counts) else None
                            rows.writerow([*prompt[:3], judge, name, model, kind, count, share, bias, faceless])
    draft.replace(file)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
