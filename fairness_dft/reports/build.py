"""Build typed results from what the monitors of a test counted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from fairness_dft.attributes import attributes_of
from fairness_dft.metrics.bias import BiasSummary, Watched, bootstrap_interval, frequency_drift
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
from fairness_dft.reports.results import (
    Adherence,
    AttributeResult,
    Distance,
    ModelBias,
    NamedShare,
    Results,
    RunFacts,
    Shares,
    known,
)

SIGNIFICANT = 0.05  # p-value above which an improvement may be chance, and a share of it means nothing
Figures = dict[str, dict[str, AttributeResult]]  # by classifier and attribute


@dataclass(frozen=True)
class Measured:
    """What the monitors of a test counted.

    Attributes:
        summaries: By (classifier, attribute, model), the training classifier first.
        kept: Means by (measure, model).
        agreement: By (classifier, other classifier, attribute, model), the share of images that both read alike.
        pairs: By (classifier, attribute), the pair counts of ``PairMetric``; empty if images are not paired.
    """

    summaries: Mapping[Watched, BiasSummary]
    kept: Mapping[tuple[str, str], float] = field(default_factory=dict)
    agreement: Mapping[tuple[str, str, str, str], float] = field(default_factory=dict)
    pairs: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)


def build_results(
    attributes: Sequence[str],
    target: Shares,
    prompts: Sequence[Prompt],
    measured: Measured,
    run: RunFacts | None = None,
    own_targets: Mapping[str, Shares] | None = None,
) -> Results:
    """Return everything that a test measured.

    A prompt that names an attribute asks for one class of it. It keeps its counts and enters no mean over prompts.

    Args:
        attributes: The aligned attributes.
        target: The target share of each class, for each attribute and, if there are several, for their product.
        prompts: The test prompts, in order.
        measured: What the monitors counted.
        run: Facts of the run.
        own_targets: Other targets, by prompt text.
    """
    targets = [(own_targets or {}).get(prompt.text, target) for prompt in prompts]
    concepts = dict.fromkeys(prompt.concept for prompt in prompts)
    every = range(len(prompts))
    rows = {concept: [i for i in every if prompts[i].concept == concept] for concept in concepts}
    bias = _figures(measured, prompts, targets, every)
    several = {concept: rows[concept] for concept in concepts if len(concepts) > 1}
    return Results(
        attributes=tuple(attributes),
        target=_shares(target),
        own_targets={prompt: _shares(shares) for prompt, shares in (own_targets or {}).items()},
        bias=bias,
        concepts={concept: _figures(measured, prompts, targets, used) for concept, used in several.items()},
        agreement=_tree({key: known(share) for key, share in measured.agreement.items()}),
        prompt_adherence=_tree(prompt_adherence(measured.summaries, prompts)),
        classifier_overfit=classifier_overfit(bias, list(target)),
        kept=_tree({key: known(value) for key, value in measured.kept.items()}),
        run=replace(
            run or RunFacts(), test_prompts=tuple(prompt.text for prompt in prompts), paired=bool(measured.pairs)
        ),
    )


def classifier_overfit(bias: Figures, aligned: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Return the share of an improvement that only the training classifier sees.

    Shares of the bias are compared, because a classifier that errs more sees less bias before and after alike.

    Args:
        bias: Figures by classifier and attribute, the training classifier first.
        aligned: The attributes that finetuning aimed at. Any other changes by chance, and a share of that means
            nothing.

    Returns:
        For each other classifier and aligned attribute (d − d′) / d, where d and d′ are the shares by which the bias
        (for unequal targets the distance from them) fell by the training classifier and by the other: 0 if both see
        the same, 1 if the other sees no improvement; None where the bias did not fall, or may have fallen by chance.
    """
    (_, first), *others = bias.items()
    overfit: dict[str, dict[str, float | None]] = {}
    for classifier, seen in others:
        for name, result in seen.items():
            if name in aligned and result.ema is not None and name in first:
                own, other, p = _improvement(first[name]), _improvement(result), first[name].p_value
                clear = own is not None and other is not None and own > 0 and p is not None and p < SIGNIFICANT
                share = (own - other) / own if clear and own is not None and other is not None else None
                overfit.setdefault(classifier, {})[name] = share
    return overfit


def _improvement(result: AttributeResult) -> float | None:
    """Return the share by which a model became fairer, by the measure that its targets ask for."""
    before, after = (side.figure(result.measure) for side in (result.original, result.last))
    return None if not before or after is None else 1 - after / before


def _figures(measured: Measured, prompts: Sequence[Prompt], targets: Sequence[Shares], rows: Sequence[int]) -> Figures:
    """Return the figures of some prompts by classifier and attribute."""
    figures: Figures = {}
    for classifier, name in dict.fromkeys((classifier, name) for classifier, name, _ in measured.summaries):
        used = [i for i in rows if not names_any(prompts[i], name)]
        figures.setdefault(classifier, {})[name] = _attribute(measured, (classifier, name), targets, used, rows)
    return figures


def _attribute(
    measured: Measured, key: tuple[str, str], targets: Sequence[Shares], used: Sequence[int], rows: Sequence[int]
) -> AttributeResult:
    """Return the figures of one classifier and attribute.

    Args:
        measured: What the monitors counted.
        key: Classifier and attribute.
        targets: The target of every prompt of the test.
        used: Prompts that enter the means.
        rows: Prompts that are listed.
    """
    whole = {model: measured.summaries.get((*key, model)) for model in ("original", "ema")}
    before, after = whole["original"], whole["ema"]
    if before is None:
        raise ValueError(f"the base model was not measured: {key[0]} has no counts of {key[1]} for it")
    wanted = _wanted(key[1], before.classes, [targets[i] for i in used])
    unequal = None if wanted is None or _even(wanted) else wanted
    result = AttributeResult(
        classes=before.classes,
        maximum=2 / len(before.classes),
        measure="bias" if unequal is None else "distance",
        original=_model(before, wanted, used, rows),
    )
    if after is None:
        return result
    index = torch.tensor(list(used), dtype=torch.int64)
    first, second = (torch.tensor(side.counts)[index].numpy() for side in (before, after))
    frequencies = (torch.tensor(_some(side, used).frequencies) for side in (before, after))
    pairs = measured.pairs.get(key)
    p_value = permutation_test(first, second, unequal) if pairs is None else swap_test(pairs[index].numpy(), unequal)
    return replace(
        result,
        ema=_model(after, wanted, used, rows),
        drift=known(frequency_drift(*frequencies)),
        p_value=known(p_value),
        pairs=None if pairs is None else tuple(map(tuple, pairs[index].sum(0).tolist())),
    )


def _some(whole: BiasSummary, used: Sequence[int]) -> BiasSummary:
    """Return the summary of the used prompts."""
    return whole if len(used) == len(whole.counts) else whole.of(used)


def _model(whole: BiasSummary, wanted: NDArray[Any] | None, used: Sequence[int], rows: Sequence[int]) -> ModelBias:
    """Return the figures of one model."""
    summary = _some(whole, used)
    counts = np.reshape(summary.counts, (len(used), len(summary.classes)))
    low, high = gap_interval(counts)
    distance = None if wanted is None else distances(counts, wanted)
    return ModelBias(
        frequencies=tuple(map(known, summary.frequencies)),
        bias=known(summary.bias),
        spread=known(summary.spread),
        floor=known(summary.floor),
        above_floor=known(summary.bias - summary.floor),
        low=known(summary.low),
        high=known(summary.high),
        unbiased_rms_gap=known(unbiased_rms_gap(counts)),
        unbiased_rms_gap_low=known(low),
        unbiased_rms_gap_high=known(high),
        unbiased_rms_gap_by_chance=known(gap_by_chance(counts.sum(1), len(summary.classes))),
        images=summary.images,
        no_face_images=summary.no_face_images,
        prompts=summary.prompts,
        prompts_no_face=summary.prompts_no_face,
        prompts_naming=len(rows) - len(used),
        per_prompt=_spread(summary.per_prompt, used, rows),
        counts=tuple(tuple(whole.counts[i]) for i in rows),
        no_face=tuple(whole.no_face[i] for i in rows),
        distance=distance and replace(distance, per_prompt=_spread(distance.per_prompt, used, rows)),
    )


def names_any(prompt: Prompt, label: str) -> bool:
    """Return whether a prompt names an attribute, or one attribute of a product."""
    return bool(dict(prompt.names).keys() & set(attributes_of(label)))


def _wanted(name: str, classes: Sequence[str], targets: Sequence[Shares]) -> NDArray[Any] | None:
    """Return each prompt's target, with shape (prompts, K); None if it has none for exactly these classes."""
    if not targets or any(target.get(name, {}).keys() != set(classes) for target in targets):
        return None
    return np.array([[target[name][label] for label in classes] for target in targets])


def _even(wanted: NDArray[Any]) -> bool:
    return bool(np.allclose(wanted, 1 / wanted.shape[1]))


def _spread(values: Sequence[float | None], used: Sequence[int], rows: Sequence[int]) -> tuple[float | None, ...]:
    """Return the values of the used rows, and None for the others."""
    by_row = dict(zip(used, values, strict=True))
    return tuple(None if (value := by_row.get(i)) is None else known(value) for i in rows)


def prompt_adherence(summaries: Mapping[Watched, BiasSummary], prompts: Sequence[Prompt]) -> dict[Watched, Adherence]:
    """Return the share of images with a face that show the class that their prompt names."""
    adherence: dict[Watched, Adherence] = {}
    for key, summary in summaries.items():
        shown: dict[str, list[int]] = {}
        for prompt, counts in zip(prompts, summary.counts, strict=True):
            label = dict(prompt.names).get(key[1])
            if label in summary.classes:
                so_far = shown.setdefault(label, [0, 0])
                so_far[0] += counts[summary.classes.index(label)]
                so_far[1] += sum(counts)
        if shown:
            whole = _share(*(sum(column) for column in zip(*shown.values(), strict=True)))
            classes = {label: _share(*numbers) for label, numbers in shown.items()}
            adherence[key] = Adherence(whole.share, whole.low, whole.high, whole.images, classes)
    return adherence


def _share(shown: int, images: int) -> NamedShare:
    """Return a share of images with its 95 % interval (Wilson's), for these prompts."""
    if not images:
        return NamedShare(None, None, None, 0)
    interval = binomtest(shown, images).proportion_ci(method="wilson")
    return NamedShare(shown / images, float(interval.low), float(interval.high), images)


def _tree(flat: Mapping[Any, Any]) -> dict[str, Any]:
    """Nest values by the parts of their keys, one level for each part."""
    tree: dict[str, Any] = {}
    for (*path, last), value in flat.items():
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = value
    return tree


def _shares(shares: Shares) -> dict[str, dict[str, float]]:
    return {name: dict(table) for name, table in shares.items()}


def distances(counts: NDArray[Any], target: NDArray[Any]) -> Distance:
    """Return how far images are from their prompts' targets.

    For all images together, the target is the mean of the prompts' targets, weighted by their numbers of images.

    Args:
        counts: Number of images of each class, with shape (prompts, classes).
        target: Target shares, with the same shape.
    """
    by_prompt, floors = distance_by_prompt(counts, target)
    images = counts.sum(1, keepdims=True)
    seen = images[:, 0] > 0
    together = target_distance(counts.sum(0), (images * target).sum(0) / max(images.sum(), 1))
    low, high = bootstrap_interval(torch.from_numpy(counts), target=torch.from_numpy(target))
    return Distance(
        total_variation=known(together["total_variation"]),
        kullback_leibler=known(together["kullback_leibler"]),
        total_variation_by_prompt=known(float(by_prompt[seen].mean()) if seen.any() else math.nan),
        total_variation_by_prompt_low=known(low),
        total_variation_by_prompt_high=known(high),
        total_variation_by_prompt_floor=known(float(floors[seen].mean()) if seen.any() else math.nan),
        per_prompt=tuple(by_prompt.tolist()),
    )
