"""An audit as one page: a file that opens without a network, in light and dark, on a phone, and prints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from fairness_dft.files import replacing
from fairness_dft.metrics.image_readings import Readings
from fairness_dft.reports import view
from fairness_dft.reports.csv_tables import ImageTable
from fairness_dft.reports.results import Results
from fairness_dft.reports.tables import breakable, classifier_title, number
from fairness_dft.reports.thumbnails import columns, count_changes

SHOWN = 3  # prompts with the largest, and with the smallest figures that are shown in images


@dataclass(frozen=True)
class ReportImages:
    """What the page needs to show images.

    Attributes:
        draw: Returns the first images of a prompt by its index: for each model with shape (n, 3, H, W), in [0, 1].
        readings: What the shown classifier reads in each image, by model.
        table: The table of images, for lines and files to link to.
    """

    draw: Callable[[int], Mapping[str, Tensor]]
    readings: Mapping[str, Readings]
    table: ImageTable


def html_report(title: str, results: Results, settings: str, method: Sequence[str], images: ReportImages) -> str:
    """Return the page.

    Args:
        title: Name of the audit.
        results: What was measured.
        settings: Settings of the audit, for readers who want to repeat it.
        method: How the audit was made, in sentences.
        images: Images of each prompt.
    """
    classifier, name = view.shown_classifier(results), results.label
    result = results.bias[classifier][name]
    rows = view.prompt_rows(results, classifier, name)
    extreme, pictured = pictured_rows(rows)
    shown = [(row, columns(row.index, images.draw(row.index), images.readings, images.table, name, result))
             for row in pictured]  # fmt: skip
    everything = [result for seen in results.bias.values() for result in seen.values()]
    return (
        environment(results)
        .get_template("report.html")
        .render(
            title=title,
            content=results,
            headline=view.headline(results),
            facts=list(facts(results)),
            settings=settings,
            method=method,
            classifier=classifier_title(results, classifier),
            attribute=name,
            attributes=view.attribute_rows(results),
            classes=palette(result.classes),
            rows=rows,
            prompts=results.run.test_prompts,
            few=view.FEW,
            several=len(results.bias) > 1,
            naming=result.original.prompts_naming,
            targeted=any(result.original.distance for result in everything),
            unequal=any(result.measure == "distance" for result in everything),
            figure=view.measure_name(result),
            floor=view.reading(result, result.last).floor,
            pairs=list(pair_rows(results, classifier)),
            paired=results.run.paired,
            compared=results.compared,
            images=[(row, pairs, count_changes(pairs)) for row, pairs in shown],
            linked=any(image.link for _, pairs in shown for column in pairs for image in column.images.values()),
            extreme=extreme,
        )
    )


def environment(results: Results) -> Environment:
    """Return the templates with their filters."""
    templates = Environment(
        loader=PackageLoader("fairness_dft.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "number": number,
        "p_value": view.p_value,
        "wrap": breakable,
        "percent": percent_text,
        "percents": percents,
        "scaled": scaled,
        "palette": palette,
        "wanted": wanted,
        "classifier": lambda name: classifier_title(results, name),
        "measure": view.measure_name,
        "reading": lambda result: view.reading(result, result.last),
        "first_reading": lambda result: view.reading(result, result.original),
    }
    templates.filters.update(filters)
    return templates


def facts(results: Results) -> Iterator[tuple[str, str]]:
    """Yield what stands above the fold, by name."""
    run, classifier = results.run, view.shown_classifier(results)
    side = results.bias[classifier][results.label].original
    images = sum(map(sum, side.counts)) + sum(side.no_face)
    if run.images:
        yield "Images of", run.images
    if run.model:
        yield "Base model" if results.compared else "Model", run.model
    if run.adapter:
        yield "Adapter", run.adapter
    yield "Date", run.date or "–"
    yield "Prompts", str(len(run.test_prompts))
    yield "Images of each model" if results.compared else "Images", str(images)
    yield (
        "No face",
        " → ".join(
            percent_text(model.no_face_share, 1) for model in results.bias[classifier][results.label].models.values()
        ),
    )
    yield "Classifier", classifier_title(results, classifier)


def pictured_rows(rows: Sequence[view.PromptRow]) -> tuple[int, list[view.PromptRow]]:
    """Return how many prompts with the largest figures are shown, and the prompts that are shown.

    With few prompts all of them are shown, and none counts as an extreme.
    """
    ranked = [row for row in rows if row.figure is not None]
    if len(ranked) > 2 * SHOWN:
        return SHOWN, [*ranked[:SHOWN], *ranked[-SHOWN:]]
    return 0, [row for row in rows if row.before or row.after][: 2 * SHOWN]


def pair_rows(results: Results, classifier: str) -> Iterator[tuple[str, int, int, list[tuple[str, str, int]]]]:
    """Yield for each aligned attribute: its name, pairs that keep their class, all pairs, and the changes."""
    for name in results.aligned:
        result = results.bias[classifier].get(name)
        if result is not None and result.pairs:
            yield name, *view.kept_pairs(result), list(view.changes(result))


def palette(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Return each class with its color."""
    return list(zip(classes, view.colors(len(classes)), strict=True))


def wanted(classes: Sequence[str], target: Mapping[str, float]) -> list[float]:
    """Return the target share of each class; empty if the target has other classes."""
    return [target[label] for label in classes] if set(target) == set(classes) else []


def percents(shares: Sequence[float | None]) -> list[float]:
    """Return shares in percent; empty if they are not known."""
    return [] if None in shares else [100 * share for share in shares if share is not None]


def percent_text(share: float | None, digits: int = 0) -> str:
    """Return a share in percent, as text."""
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def scaled(value: float, maximum: float) -> str:
    """Return a figure in percent of its maximum, where the figure's line ends."""
    return f"{100 * min(max(value / maximum, 0), 1):.2f}"


def write_html(file: Path, page: str) -> None:
    """Write the page in one piece."""
    with replacing(file) as draft:
        draft.write_text(page, encoding="utf-8")
