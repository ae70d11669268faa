"""An audit as one page: a file that opens without a network, in light and dark, and prints."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from fairness_dft.attributes import TIMES
from fairness_dft.report import PALETTE

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
        bias: of the last model; None if no image shows a face.
    """

    index: int
    text: str
    before: list[float]
    after: list[float] | None
    bias: float | None


def shown_judge(content: Mapping[str, Any]) -> str:
    """Whose verdict of each prompt is shown: the independent one's, if it reads what is aligned."""
    aligned = TIMES.join(content["attributes"])
    return "independent" if aligned in content["bias"].get("independent", {}) else "training"


def html_report(title: str, content: Mapping[str, Any], settings: str, grid: Grid) -> str:
    """The page.

    Args:
        title: name of the audit.
        content: of results.json.
        settings: with which it was made, for the reader who wants to make it again.
        grid: draws the picture of a prompt, by its index, as `shown_judge` sees it.
    """
    judge, name = shown_judge(content), TIMES.join(content["attributes"])
    rows = prompt_rows(content, judge, name)
    seen = [row for row in rows if row.bias is not None]
    classes = content["bias"][judge][name]["original"]["classes"]
    targets = {} if content["run"].get("other_targets") else content["target"].get(name, {})
    targets = targets if targets.keys() == set(classes) else {}
    few = len(seen) <= 2 * SHOWN
    pictured = seen if few else [*seen[:SHOWN], *seen[-SHOWN:]]
    environment = Environment(
        loader=PackageLoader("fairness_dft", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "p_value": p_value, "wrap": wrap, "share": share}
    return environment.get_template("audit.html").render(
        title=title,
        content=content,
        settings=settings,
        judge=judge,
        attribute=name,
        classes=list(zip(classes, colours(len(classes)), strict=True)),
        target=[share for _, share in sorted(targets.items(), key=lambda pair: classes.index(pair[0]))],
        rows=rows,
        compared="ema" in content["bias"][judge][name],
        pictures=[(row, data_url(grid(row.index))) for row in pictured],
        worst=0 if few else SHOWN,
    )


def prompt_rows(content: Mapping[str, Any], judge: str, name: str) -> list[PromptRow]:
    """Each prompt, the most biased one (by the last model) first, and those without a face last."""
    models = content["bias"][judge][name]
    before, after = models["original"], models.get("ema")
    rows = []
    for index, text in enumerate(content["run"]["test_prompts"]):
        shares = [percent(side["counts"][index]) if side else None for side in (before, after)]
        rows.append(PromptRow(index, text, *shares, (after or before)["per_prompt"][index]))
    return sorted(rows, key=lambda row: -1 if row.bias is None else row.bias, reverse=True)


def percent(counts: Sequence[int]) -> list[float]:
    """Shares of a hundred; empty if there is nothing to share."""
    return [100 * count / sum(counts) for count in counts] if sum(counts) else []


def colours(count: int) -> list[str]:
    """A colour for each of some classes: for few those of the pictures, for many a wheel of hues."""
    if count < len(PALETTE):
        return list(PALETTE[:count])
    return [f"hsl({360 * index // count} 60% {40 + 20 * (index % 2)}%)" for index in range(count)]


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def p_value(value: float | None) -> str:
    """A p-value, which no number of permutations shows to be 0."""
    return "< 0.001" if value is not None and value < 0.001 else number(value, 3)


def share(side: Mapping[str, Any]) -> str:
    """The share of a model's images without a face, in percent."""
    return f"{100 * side['without_face'] / max(side['images'], 1):.1f} %"


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
