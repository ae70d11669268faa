"""Tables of an audit for spreadsheets: per_prompt.csv and per_image.csv."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairness_dft.files import replacing
from fairness_dft.metrics.bias import finite_sample_floor
from fairness_dft.metrics.image_readings import Readings
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.results import AttributeResult, ModelBias, Results

PROMPT_COLUMNS = (
    "prompt",
    "subject",
    "concept",
    "classifier",
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
IMAGE_COLUMNS = ("model", "prompt", "image", "seed", "file", "face")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a text that starts so is a formula to a spreadsheet


def safe_cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: such a text gets an apostrophe in front.

    Example:
        >>> safe_cell("=1+1"), safe_cell("a chef"), safe_cell(-0.5)
        ("'=1+1", 'a chef', -0.5)
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def write_table(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file in one piece, without formulas."""
    with replacing(file) as draft, draft.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(map(safe_cell, header))
        writer.writerows(map(safe_cell, row) for row in rows)


def write_per_prompt(file: Path, results: Results, prompts: Sequence[Prompt]) -> None:
    """Write per_prompt.csv: a row for each classifier, attribute, model, prompt and class."""
    write_table(file, PROMPT_COLUMNS, prompt_rows(results, prompts))


def prompt_rows(results: Results, prompts: Sequence[Prompt]) -> Iterator[list[Any]]:
    """Yield the rows of per_prompt.csv."""
    for classifier, seen in results.bias.items():
        for name, result in seen.items():
            for model, side in result.models.items():
                for index, prompt in enumerate(prompts):
                    target = results.target_of(prompt.text).get(name, {})
                    for row in class_rows(result, side, index, target):
                        yield [*prompt[:3], classifier, name, model, *row]


def class_rows(
    result: AttributeResult, side: ModelBias, index: int, target: Mapping[str, float]
) -> Iterator[list[Any]]:
    """Yield the last eight of ``PROMPT_COLUMNS`` for each class of one prompt and model."""
    counts, bias = side.counts[index], side.per_prompt[index]
    distance = side.distance.per_prompt[index] if side.distance else None
    floor = None if bias is None else float(finite_sample_floor(sum(counts), len(counts)))
    for label, count in zip(result.classes, counts, strict=True):
        share = count / sum(counts) if sum(counts) else None
        yield [label, count, share, target.get(label), bias, floor, distance, side.no_face[index]]


@dataclass(frozen=True)
class ImageTable:
    """One row for each image, or for each face if every face counts, as per_image.csv holds it.

    Attributes:
        columns: Names of the columns.
        rows: Cells of each row.
        lines: Line of the file, by (model, index of the prompt, number of the image), with the image's first face.
    """

    columns: tuple[str, ...]
    rows: list[list[Any]]
    lines: dict[tuple[str, int, int], int]

    def write(self, file: Path) -> None:
        """Write per_image.csv."""
        write_table(file, self.columns, self.rows)


def image_table(
    prompts: Sequence[Prompt],
    readings: Mapping[tuple[str, str], Readings],
    classes: Mapping[str, Mapping[str, Sequence[str]]],
    file: Callable[[str, int, int], str] | None = None,
) -> ImageTable:
    """Return what every classifier reads in each image.

    Args:
        prompts: The prompts, in order.
        readings: By (classifier, model).
        classes: Class names, by classifier and attribute.
        file: Returns the file of an image by its model, the index of its prompt and its seed; None if none is kept.
    """
    columns = list(IMAGE_COLUMNS)
    for classifier, names in classes.items():
        columns += [f"{classifier}.box_{edge}" for edge in ("left", "top", "right", "bottom")]
        columns += [f"{classifier}.{name}{end}" for name in names for end in ("", "_probability")]
    rows: list[list[Any]] = []
    lines: dict[tuple[str, int, int], int] = {}
    for model in dict.fromkeys(model for _, model in readings):
        places = {classifier: _places(readings[classifier, model]) for classifier in classes}
        for key in sorted(set().union(*places.values())):
            prompt, image, face = key
            lines.setdefault((model, prompt, image), len(rows) + 2)  # the header is line 1
            cells: list[Any] = []
            seed = 0
            for classifier, names in classes.items():
                table = readings[classifier, model]
                place = places[classifier].get(key)
                cells += _reading(table, place, names)
                seed = seed if place is None else int(table.seed[place])
            path = file(model, prompt, seed) if file else ""
            rows.append([model, prompts[prompt].text, image, seed, path, face, *cells])
    return ImageTable(tuple(columns), rows, lines)


def _places(readings: Readings) -> dict[tuple[int, int, int], int]:
    """Return the row of each (prompt, image, face); images and faces are numbered from 1."""
    images: dict[int, dict[int, int]] = {}  # number of each seed's image, by prompt
    faces: dict[tuple[int, int], int] = {}
    places = {}
    for place, (prompt, seed) in enumerate(zip(readings.prompt.tolist(), readings.seed.tolist(), strict=True)):
        numbers = images.setdefault(prompt, {})
        image = numbers.setdefault(seed, len(numbers) + 1)
        face = faces[prompt, image] = faces.get((prompt, image), 0) + 1
        places[prompt, image, face] = place
    return places


def _reading(readings: Readings, place: int | None, classes: Mapping[str, Sequence[str]]) -> list[Any]:
    """Return the cells of one classifier: box, then class and probability of each attribute; empty without a face."""
    if place is None or not readings.has_face[place]:
        return [None] * (4 + 2 * len(classes))
    cells: list[Any] = [round(edge, 1) for edge in readings.boxes[place].tolist()]
    for name, labels in classes.items():
        probability, index = readings.probabilities[name][place].max(0)
        cells += [labels[int(index)], round(float(probability), 4)]
    return cells
