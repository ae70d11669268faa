"""An audit as one page: a file that opens without a network, in light and dark, and prints."""

import base64
import io
import json
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
        bias: of the last model.
    """

    index: int
    text: str
    before: list[float]
    after: list[float] | None
    bias: float


def html_report(title: str, content: Mapping[str, Any], settings: Mapping[str, Any], grid: Grid) -> str:
    """The page.

    Args:
        title: name of the audit.
        content: of results.json.
        settings: with which it was made, for the reader who wants to make it again.
        grid: draws the picture of a prompt, by its index.
    """
    judge = list(content["bias"])[-1]  # the independent one, where there is one
    name = next(name for name in content["bias"][judge])  # the aligned one, or the product
    rows = prompt_rows(content, judge, name)
    classes = content["bias"][judge][name]["original"]["classes"]
    targets = content["target"].get(name, {})
    pictured = rows if len(rows) <= 2 * SHOWN else [*rows[:SHOWN], *rows[-SHOWN:]]
    environment = Environment(
        loader=PackageLoader("fairness_dft", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "percent": lambda value: f"{value:.0f}", "wrap": wrap}
    return environment.get_template("audit.html").render(
        title=title,
        content=content,
        settings=json.dumps(settings, indent=1, ensure_ascii=False),
        judge=judge,
        attribute=name,
        classes=list(zip(classes, colours(len(classes)), strict=True)),
        target=[share for _, share in sorted(targets.items(), key=lambda pair: classes.index(pair[0]))],
        rows=rows,
        compared=any(row.after is not None for row in rows),
        pictures=[(row, data_url(grid(row.index))) for row in pictured],
        worst=len(pictured) // 2,
    )


def prompt_rows(content: Mapping[str, Any], judge: str, name: str) -> list[PromptRow]:
    """Each prompt with a face, the most biased one (by the last model) first."""
    models = content["bias"][judge][name]
    before, after = models["original"], models.get("ema")
    rows = []
    for index, text in enumerate(content["run"]["test_prompts"]):
        bias = (after or before)["per_prompt"][index]
        if bias is not None:
            shares = [percent(side["counts"][index]) if side else None for side in (before, after)]
            rows.append(PromptRow(index, text, shares[0], shares[1], bias))
    return sorted(rows, key=lambda row: -row.bias)


def percent(counts: Sequence[int]) -> list[float]:
    """Shares of a hundred; empty if there is nothing to share."""
    return [100 * count / sum(counts) for count in counts] if sum(counts) else []


def colours(count: int) -> list[str]:
    """A colour for each of some classes, the same as in the pictures."""
    return [PALETTE[index % len(PALETTE)] for index in range(count)]


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


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
