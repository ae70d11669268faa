"""An audit as one page: a file that opens without a network, in light and dark, and prints."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from fairness_dft.attributes import TIMES
from fairness_dft.reports.grid import PALETTE
from fairness_dft.reports.results import ModelBias, Results
from fairness_dft.reports.tables import number

SHOWN = 3  # worst and best prompts that are shown in pictures
Grid = Callable[[int], Image.Image]


@dataclass(frozen=True)
class PromptRow:
    """What was seen of one prompt.

    Attributes:
        index: its position among the prompts.
        text: the prompt.
        before: frequency of each class, in percent; empty if no image shows a face.
        after: likewise, of the finetuned model; None if there is none.
        figure: bias or distance of the last model; None if no image shows a face, or the prompt names the attribute.
        target: share of each class that is wanted; empty if nothing is.
    """

    index: int
    text: str
    before: list[float]
    after: list[float] | None
    figure: float | None
    target: list[float]


def shown_classifier(results: Results) -> str:
    """Return whose reading of each prompt is shown: the independent classifier's, if it reads the aligned attribute."""
    return "independent" if results.label in results.bias.get("independent", {}) else "training"


def html_report(title: str, content: Results, settings: str, method: Sequence[str], grid: Grid) -> str:
    """The page.

    Args:
        title: name of the audit.
        content: of results.json.
        settings: with which it was made, for the reader who wants to make it again.
        method: how it was made, in sentences.
        grid: draws the picture of a prompt, by its index, as `shown_judge` sees it.
    """
    judge, name = shown_classifier(content), content.label
    models = content.bias[judge][name]
    classes = models.classes
    rows = prompt_rows(content, judge, name)
    ranked = [row for row in rows if row.figure is not None]
    few = len(ranked) <= 2 * SHOWN
    pictured = [*ranked[:SHOWN], *ranked[-SHOWN:]]
    if few:
        pictured = [row for row in rows if row.before or row.after][: 2 * SHOWN]
    environment = Environment(
        loader=PackageLoader("fairness_dft.reports", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "p_value": p_value, "wrap": wrap, "share": share}
    return environment.get_template("audit.html").render(
        title=title,
        content=content,
        settings=settings,
        method=method,
        judge=judge,
        attribute=name,
        classes=list(zip(classes, colours(len(classes)), strict=True)),
        rows=rows,
        biases=list(content.rows()),
        naming=models.original.prompts_naming,
        measured=any(of.original.distance for seen in content.bias.values() for of in seen.values()),
        unequal=any(of.measure != "bias" for seen in content.bias.values() for of in seen.values()),
        figure="bias" if models.measure == "bias" else "distance from the target",
        floor=typical_floor(models.last, models.measure),
        paired=content.run.paired,
        compared=models.ema is not None,
        pictures=[(row, data_url(grid(row.index))) for row in pictured],
        worst=0 if few else SHOWN,
    )


def typical_floor(side: ModelBias, measure: str) -> float | None:
    """What a fair model, or one that meets its target, would have of a prompt by chance, averaged over prompts."""
    return side.floor if measure == "bias" or not side.distance else side.distance.total_variation_by_prompt_floor


def prompt_rows(content: Results, judge: str, name: str) -> list[PromptRow]:
    """Each prompt, the most biased one (by the last model) first, and those without a figure last.

    Where the wanted shares are unequal, the farthest from them is the first.
    """
    models = content.bias[judge][name]
    before, after, last = models.original, models.ema, models.last
    figures = last.per_prompt if models.measure == "bias" or not last.distance else last.distance.per_prompt
    rows = []
    for index, text in enumerate(content.run.test_prompts):
        shares = [percent(side.counts[index]) if side else None for side in (before, after)]
        wanted = content.target_of(text).get(name, {}) if last.distance else {}
        target = [wanted[kind] for kind in models.classes] if wanted else []
        rows.append(PromptRow(index, text, *shares, figures[index], target))
    return sorted(rows, key=lambda row: -1 if row.figure is None else row.figure, reverse=True)


def percent(counts: Sequence[int]) -> list[float]:
    """Shares of a hundred; empty if there is nothing to share."""
    return [100 * count / sum(counts) for count in counts] if sum(counts) else []


def colours(count: int) -> list[str]:
    """A colour for each of some classes: for few those of the pictures, for many a wheel of hues."""
    if count < len(PALETTE):
        return list(PALETTE[:count])
    return [f"hsl({360 * index // count} 60% {40 + 20 * (index % 2)}%)" for index in range(count)]


def p_value(value: float | None) -> str:
    """A p-value, which no number of permutations shows to be 0."""
    return "< 0.001" if value is not None and value < 0.001 else number(value, 3)


def share(side: ModelBias) -> str:
    """The share of a model's images without a face, in percent."""
    found = side.no_face_share
    return "–" if found is None else f"{100 * found:.1f} %"


def wrap(name: str) -> str:
    """A product of attributes, with room to break the line."""
    return name.replace(TIMES, f" {TIMES} ")


def data_url(picture: Image.Image) -> str:
    """A picture inside the page."""
    stream = io.BytesIO()
    picture.save(stream, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def write_html(file: Path, page: str) -> None:
    """Write the page in one piece."""
    draft = file.with_suffix(".part")
    draft.write_text(page, encoding="utf-8")
    draft.replace(file)
