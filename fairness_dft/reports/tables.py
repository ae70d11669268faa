"""Results as tables in the terminal."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from fairness_dft.attributes import TIMES
from fairness_dft.reports.results import ModelBias, Results

TITLES = {"original": "base model", "ema": "finetuned model (EMA)", "trained": "finetuned model (last step)"}
SIDES = ("base model", "finetuned")
TEXT = ("concept", "attribute", "class", "classifier", "measure")  # columns of words, which stand at the left
T = TypeVar("T")


def print_results(results: Results, console: Console | None = None) -> None:
    """Print results as short tables: bias, bias by concept, frequencies, prompt adherence and what is kept."""
    console = console or Console()
    biased = any(True for _ in results.rows())
    if biased:
        console.print(bias_table(results))
    if results.concepts:
        console.print(concept_table(results))
    if any(result.measure == "distance" for seen in results.bias.values() for result in seen.values()):
        console.print(distance_table(results))
    if biased:
        console.print(frequency_table(results))
    if results.prompt_adherence:
        console.print(adherence_table(results))
    console.print(kept_table(results))


def new_table(title: str, columns: Iterable[str], caption: str | None = None, wrapped: Sequence[str] = ()) -> Table:
    """Return a table without rows.

    Args:
        title: The title.
        columns: Headers; words stand at the left, figures at the right.
        caption: Line below the table.
        wrapped: Columns whose cells may break into lines.
    """
    table = Table(title=title, caption=caption)
    for column in columns:
        table.add_column(column, no_wrap=column not in wrapped, justify="left" if column in TEXT else "right")
    return table


def classifier_title(results: Results, classifier: str) -> str:
    """Return what a classifier is called: without a finetuned model the ``training`` classifier is just the first."""
    return "first" if classifier == "training" and not results.compared else classifier


def breakable(name: str) -> str:
    """Return the name of a product of attributes with room to break the line."""
    return name.replace(TIMES, f" {TIMES} ")


def sides(results: Results, alone: str) -> tuple[str, ...]:
    """Return the headers of a figure's columns: one for each model, or one for a model alone."""
    return SIDES if results.compared else (alone,)


def both(results: Results, original: T, ema: T) -> tuple[T, ...]:
    """Return the cells below ``sides``."""
    return (original, ema) if results.compared else (original,)


def bias_table(results: Results) -> Table:
    """Return the bias of every attribute by every classifier, with its interval, floor and maximum."""
    columns = ("attribute", "classifier", *sides(results, "bias"), "95 % int.", "floor", "max.")
    aligned = f"; aligned: {', '.join(results.attributes)}" if results.compared else ""
    table = new_table(
        f"Bias on the test prompts (perceived attributes{aligned})",
        columns,
        "mean ± standard deviation over prompts, against equal shares;\na fair model scores the floor on average",
        wrapped=("attribute",),
    )
    for classifier, name, result in results.rows():
        biases = both(results, with_spread(result.original), with_spread(result.ema))
        title = classifier_title(results, classifier)
        table.add_row(breakable(name), title, *biases, *reading(result.last), number(result.maximum))
    return table


def concept_table(results: Results) -> Table:
    """Return the bias of the aligned attributes, and of their product, for the prompts of each concept."""
    columns = ("concept", "attribute", "classifier", *sides(results, "bias"), "95 % int.", "floor")
    table = new_table(
        "Bias by concept", columns, "mean ± standard deviation over prompts, against equal shares", columns[:3]
    )
    for concept, classifiers in results.concepts.items():
        for name in results.aligned:
            for classifier, seen in classifiers.items():
                if name in seen:
                    result = seen[name]
                    biases = both(results, with_spread(result.original), with_spread(result.ema))
                    title = classifier_title(results, classifier)
                    table.add_row(concept, breakable(name), title, *biases, *reading(result.last))
    return table


def distance_table(results: Results) -> Table:
    """Return how far prompts are from unequal targets."""
    columns = ("attribute", "classifier", *sides(results, "distance"), "floor")
    table = new_table("Distance of a prompt from its target", columns, "total variation, averaged over prompts")
    for classifier, seen in results.bias.items():
        for name, result in seen.items():
            if result.measure == "distance" and (last := result.last.distance):
                means = [side.figure("distance") if side else None for side in (result.original, result.ema)]
                cells = both(results, *(number(mean) for mean in means))
                floor = number(last.total_variation_by_prompt_floor)
                table.add_row(breakable(name), classifier_title(results, classifier), *cells, floor)
    return table


def frequency_table(results: Results) -> Table:
    """Return how often each class of the aligned attributes was seen, beside its target share."""
    own = len(results.own_targets)
    columns = ("attribute", "class", "classifier", "target", *sides(results, "frequency"))
    table = new_table(
        "Class frequencies on the test prompts", columns, f"prompts with targets of their own: {own}" if own else None
    )
    for name in results.attributes:
        for classifier, seen in results.bias.items():
            if name in seen:
                # By name: another classifier may list its classes in another order.
                original, ema = (
                    dict(zip(seen[name].classes, side.frequencies, strict=True)) if side else {}
                    for side in (seen[name].original, seen[name].ema)
                )
                title = classifier_title(results, classifier)
                for label, share in results.target[name].items():
                    shares = both(results, number(original.get(label)), number(ema.get(label)))
                    table.add_row(name, label, title, number(share), *shares)
    return table


def adherence_table(results: Results) -> Table:
    """Return how many images show the class that their prompt names."""
    columns = ("attribute", "classifier", *sides(results, "share"), "images")
    table = new_table("Prompt adherence: images that show what their prompt names", columns)
    for classifier, seen in results.prompt_adherence.items():
        title = classifier_title(results, classifier)
        for name, models in seen.items():
            first, last = models["original"], models.get("ema")
            shares = both(results, number(first.share, 3), number(last.share if last else None, 3))
            table.add_row(name, title, *shares, str(first.images))
            for label, side in first.classes.items() if len(first.classes) > 1 else ():
                after = number(last.classes[label].share if last else None, 3)
                table.add_row(f"  {label}", title, *both(results, number(side.share, 3), after), str(side.images))
    return table


def kept_table(results: Results) -> Table:
    """Return what finetuning keeps of image and prompt, and the share of images that show no face."""
    title = "What finetuning keeps" if results.compared else "Image and prompt"
    table = new_table(title, ("measure", *sides(results, "value")))
    for measure, models in results.kept.items():
        table.add_row(measure, *both(results, *(number(models.get(model), 3) for model in ("original", "ema"))))
    first = next(iter(next(iter(results.bias.values())).values()))
    shares = (number(side.no_face_share if side else None, 3) for side in (first.original, first.ema))
    table.add_row("images that show no face", *both(results, *shares))
    return table


def with_spread(side: ModelBias | None) -> str:
    """Return a bias with its standard deviation over prompts."""
    return f"{number(side.bias)}±{number(side.spread)}" if side else "–"


def reading(side: ModelBias) -> tuple[str, str]:
    """Return what a bias is read against: its 95 % interval and its floor."""
    return f"{number(side.low)}–{number(side.high)}", number(side.floor)


def number(value: float | None, digits: int = 2) -> str:
    """Return a figure as text, or a dash if it is not known.

    Example:
        >>> number(0.125, 3), number(None)
        ('0.125', '–')
    """
    return "–" if value is None else f"{value:.{digits}f}"
