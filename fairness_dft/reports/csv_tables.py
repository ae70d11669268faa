"""Tables of an audit for spreadsheets: per_prompt.csv and per_image.csv."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairness_dft.files import replacing
from fairness_dft.metrics.bias import finite_sample_floor
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
