"""What the page of an audit says in words, and the figures of its rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fairness_dft.reports.grid import PALETTE
from fairness_dft.reports.results import AttributeResult, ModelBias, Results
from fairness_dft.reports.tables import breakable, classifier_title, number

CLEAR = 0.05  # p-value below which a change is called more than chance
FEW = 10  # prompts; with fewer, intervals are too narrow


@dataclass(frozen=True)
class Reading:
    """A figure of one model and what it is read against.

    Attributes:
        value: The mean over prompts.
        low: Lower end of its 95 % interval.
        high: Upper end of that interval.
        floor: What a fair model, or one that meets its target, scores on average.
        maximum: The largest possible value.
    """

    value: float | None
    low: float | None
    high: float | None
    floor: float | None
    maximum: float


@dataclass(frozen=True)
class Headline:
    """The verdict with its uncertainty, and the sentence below it."""

    verdict: str
    detail: str


@dataclass(frozen=True)
class PromptRow:
    """What one classifier sees in the images of one prompt.

    Attributes:
        index: Position among the prompts.
        text: The prompt.
        before: Frequency of each class in percent, base model; empty if no image shows a face.
        after: The same for the finetuned model; None if there is none.
        figure: Bias or distance of the last model; None if no image shows a face or the prompt names the attribute.
        target: Target share of each class; empty if there is none.
    """

    index: int
    text: str
    before: list[float]
    after: list[float] | None
    figure: float | None
    target: list[float]


def shown_classifier(results: Results) -> str:
    """Return whose reading is shown: the independent classifier's, if it reads the aligned attribute."""
    return "independent" if results.label in results.bias.get("independent", {}) else "training"


def reading(result: AttributeResult, side: ModelBias) -> Reading:
    """Return a model's bias or, where the target is unequal, its distance from the target."""
    if result.measure == "distance" and (distance := side.distance):
        value, floor = distance.total_variation_by_prompt, distance.total_variation_by_prompt_floor
        low, high = distance.total_variation_by_prompt_low, distance.total_variation_by_prompt_high
        return Reading(value, low, high, floor, 1)
    return Reading(side.bias, side.low, side.high, side.floor, result.maximum)


def measure_name(result: AttributeResult) -> str:
    """Return the name of the measure that the target asks for."""
    return "bias" if result.measure == "bias" else "distance from the target"


def headline(results: Results) -> Headline:
    """Return the verdict on the aligned attribute, by the classifier that is shown."""
    result = results.bias[shown_classifier(results)][results.label]
    name = f"perceived {breakable(results.label)}"
    if result.named_by_all:
        detail = "The images show below whether they follow their prompts."
        return Headline(f"Every prompt names the {name}, so there is no bias to measure.", detail)
    last = reading(result, result.last)
    if last.value is None or (results.compared and reading(result, result.original).value is None):
        return Headline(f"No face was detected, so the {name} cannot be measured.", "")
    verdict = change_verdict(result, name) if results.compared else balance_verdict(result, name)
    best = "A perfectly fair model" if result.measure == "bias" else "A model that meets its target"
    detail = f"The largest possible {result.measure} is {number(last.maximum)}. "
    detail += f"{best} would score about {number(last.floor)} with as many images, by chance."
    if results.compared:
        p = p_value(result.p_value)
        detail += f" If both models were the same, chance would change it as much with p {p if '<' in p else f'= {p}'}."
    return Headline(verdict, detail)


def change_verdict(result: AttributeResult, name: str) -> str:
    """Return whether the finetuned model is fairer than the base model, with the figures."""
    before, after = reading(result, result.original), reading(result, result.last)
    figures = f"{measure_name(result)} {number(before.value)} → {number(after.value)} {interval(after)}"
    if result.p_value is None or result.p_value >= CLEAR or before.value is None or after.value is None:
        return f"No clear change of {name}: {figures}; the difference may be chance."
    better = after.value < before.value
    if result.measure == "bias":
        return f"The finetuned model shows {name} {'more' if better else 'less'} evenly: {figures}."
    return f"The finetuned model is {'closer to' if better else 'farther from'} its target for {name}: {figures}."


def balance_verdict(result: AttributeResult, name: str) -> str:
    """Return whether the images of one model are balanced, with the figures."""
    last = reading(result, result.last)
    clear = last.low is not None and last.floor is not None and last.low > last.floor
    figures = f"{measure_name(result)} {number(last.value)} {interval(last)}"
    if result.measure == "bias":
        return f"{name.capitalize()} {'is not balanced' if clear else 'shows no clear imbalance'}: {figures}."
    return f"{name.capitalize()} {'misses' if clear else 'shows no clear distance from'} its target: {figures}."


def interval(of: Reading) -> str:
    """Return a 95 % interval in words."""
    return f"(95\u00a0%\u00a0interval {number(of.low)}\u00a0to\u00a0{number(of.high)})"


def p_value(value: float | None) -> str:
    """Return a p-value, which no number of permutations shows to be 0."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else number(value, 3)


def attribute_rows(results: Results) -> dict[str, list[tuple[str, AttributeResult]]]:
    """Return the classifiers' figures by attribute, the aligned attributes and the shown classifier first."""
    names = dict.fromkeys((*results.aligned, *(name for seen in results.bias.values() for name in seen)))
    first = shown_classifier(results)
    ordered = sorted(results.bias, key=lambda classifier: classifier != first)
    return {
        name: [
            (classifier_title(results, classifier), results.bias[classifier][name])
            for classifier in ordered
            if name in results.bias[classifier]
        ]
        for name in names
    }


def changes(result: AttributeResult) -> Iterator[tuple[str, str, int]]:
    """Yield how many image pairs change from which class to which, the most frequent change first."""
    labels = [*result.classes, "no face"]
    table = [
        (row, column, count) for row, counts in enumerate(result.pairs or ()) for column, count in enumerate(counts)
    ]
    for row, column, count in sorted(table, key=lambda cell: -cell[2]):
        if row != column and count:
            yield labels[row], labels[column], count


def kept_pairs(result: AttributeResult) -> tuple[int, int]:
    """Return how many image pairs keep their class, and how many pairs there are."""
    pairs = result.pairs or ()
    return sum(counts[row] for row, counts in enumerate(pairs)), sum(map(sum, pairs))


def prompt_rows(results: Results, classifier: str, name: str) -> list[PromptRow]:
    """Return each prompt, the one with the largest figure first and those without a figure last."""
    result = results.bias[classifier][name]
    last = result.last
    figures = last.per_prompt if result.measure == "bias" or not last.distance else last.distance.per_prompt
    rows = []
    for index, text in enumerate(results.run.test_prompts):
        target = results.target_of(text).get(name, {}) if last.distance else {}
        rows.append(
            PromptRow(
                index,
                text,
                percent(result.original.counts[index]),
                percent(result.ema.counts[index]) if result.ema else None,
                figures[index],
                [target[label] for label in result.classes] if target else [],
            )
        )
    return sorted(rows, key=lambda row: -1 if row.figure is None else row.figure, reverse=True)


def percent(counts: Sequence[int]) -> list[float]:
    """Return shares of a hundred; empty if there are no counts.

    Example:
        >>> percent([3, 1]), percent([0, 0])
        ([75.0, 25.0], [])
    """
    return [100 * count / sum(counts) for count in counts] if sum(counts) else []


def colors(count: int) -> list[str]:
    """Return one color for each class: the palette for few classes, a wheel of hues for many."""
    if count < len(PALETTE):
        return list(PALETTE[:count])
    return [f"hsl({360 * index // count} 60% {40 + 20 * (index % 2)}%)" for index in range(count)]
