"""The before/after figure: one row of images for each model, one column for each noise, with counts of classes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fairness_dft.reports.tables import TITLES

# Okabe and Ito's palette, which color-blind readers can tell apart, and gray for "no face".
PALETTE = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
NO_FACE = "#9A9A9A"
TILE, BAR, GAP, MARGIN = 72, 8, 2, 24
LINE, SMALL = 22, 15  # heights of a line of text
SOFT = "#333333"


@dataclass(frozen=True)
class GridSide:
    """One model's images of a prompt, and what a classifier reads in them.

    Attributes:
        images: The images, with shape (n, 3, H, W), in [0, 1].
        classes: Class of each image by each of the A attributes, int64 with shape (n, A); any value where there is no
            face.
        has_face: Whether an image shows a face, bool with shape (n,).
    """

    images: Tensor
    classes: Tensor
    has_face: Tensor

    def reading(self, index: int) -> tuple[int, ...] | None:
        """Return the classes of one image; None if it shows no face."""
        return tuple(self.classes[index].tolist()) if self.has_face[index] else None


@dataclass
class GridRow:
    """One prompt of the figure.

    Attributes:
        prompt: The text.
        sides: Each model's images from the same noises, by the model's name.
    """

    prompt: str
    sides: dict[str, GridSide] = field(default_factory=dict)

    def readings(self) -> list[tuple[tuple[int, ...] | None, ...]]:
        """Return for each noise what is read in each model's image."""
        sides = list(self.sides.values())
        return [tuple(side.reading(index) for side in sides) for index in range(len(sides[0].has_face))]

    def order(self) -> list[int]:
        """Return the noises in the order of their columns: by class in the first model, then in the next."""
        readings = self.readings()
        return sorted(
            range(len(readings)), key=lambda index: [(reading is None, reading or ()) for reading in readings[index]]
        )

    def title(self) -> str:
        """Return the prompt and, of several models, how many noises change class between them."""
        readings = self.readings()
        changed = sum(len(set(classes)) > 1 for classes in readings)
        compared = len(self.sides) > 1 and all(side.classes.shape[1] for side in self.sides.values())
        return f"{self.prompt}   ({changed} of {len(readings)} change class)" if compared else self.prompt


@dataclass(frozen=True)
class Layout:
    """Where everything stands, in pixels.

    Attributes:
        left: Left edge of the first column.
        head: Top of the first prompt.
        columns: Number of columns.
        models: Number of models.
        attributes: Number of attributes A.
    """

    left: int
    head: int
    columns: int
    models: int
    attributes: int

    @property
    def tile_height(self) -> int:
        """Height of an image with its bars."""
        return TILE + BAR * self.attributes + GAP

    @property
    def right(self) -> int:
        """Left edge of the counts."""
        return self.left + self.columns * (TILE + GAP) + 10

    def top(self, prompt: int) -> int:
        """Return the top of a prompt's text."""
        return self.head + prompt * (LINE + self.tile_height * self.models + 14)

    def place(self, prompt: int, model: int, column: int) -> tuple[int, int]:
        """Return the upper left corner of an image."""
        return self.left + column * (TILE + GAP), self.top(prompt) + LINE + model * self.tile_height


def titles(rows: Sequence[GridRow]) -> dict[str, str]:
    """Return what each model is called; one alone is neither before nor after, and has no title."""
    models = list(rows[0].sides)
    return {model: TITLES.get(model, model) if len(models) > 1 else "" for model in models}


def layout(rows: Sequence[GridRow], attributes: int) -> Layout:
    """Return where everything stands."""
    widest = max(_width(title, SMALL) for title in titles(rows).values())
    left = MARGIN + (widest + 10 if widest else 0)
    return Layout(left, 18 + LINE * attributes, max(len(row.order()) for row in rows), len(rows[0].sides), attributes)


def comparison_grid(rows: Sequence[GridRow], classes: Mapping[str, Sequence[str]]) -> Image.Image:
    """Draw prompts below each other, each with one row of images for each model and one column for each noise.

    Below each image is a colored bar for each attribute; at the right stand the numbers of images of each class.

    Args:
        rows: The prompts, all with the same models.
        classes: Class names of each attribute, which has a bar and a line of the legend.
    """
    where, names_of = layout(rows, len(classes)), titles(rows)
    counts = [text for row in rows for side in row.sides.values() for text in _counts(side, classes)]
    right = where.right + max((_width(text, SMALL) for text in counts), default=0) + MARGIN
    size = max(right, *_text_widths(rows, classes)), where.top(len(rows))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for line, (attribute, names) in enumerate(classes.items()):
        _legend(pen, attribute, names, (MARGIN, 10 + LINE * line))
    for number, row in enumerate(rows):
        pen.text((MARGIN, where.top(number)), row.title(), fill=SOFT, font=_font(14))
        for line, (model, side) in enumerate(row.sides.items()):
            _, top = place = where.place(number, line, 0)
            pen.text((MARGIN, top + TILE // 2 - 8), names_of[model], fill="black", font=_font(SMALL))
            _paste_row(canvas, pen, side, row.order(), place)
            for index, text in enumerate(_counts(side, classes)):
                pen.text((where.right, top + 4 + (SMALL + 3) * index), text, fill=SOFT, font=_font(SMALL))
    return canvas


def _paste_row(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, side: GridSide, order: Sequence[int], place: tuple[int, int]
) -> None:
    """Paste one model's images with their bars from left to right."""
    attributes = side.classes.shape[1]
    for column, index in enumerate(order):
        x, y = place[0] + column * (TILE + GAP), place[1]
        pixels = (side.images[index].permute(1, 2, 0) * 255).round().byte().numpy()
        canvas.paste(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC), (x, y))
        for bar, label in enumerate(side.reading(index) or [None] * attributes):
            top = y + TILE + bar * BAR
            pen.rectangle((x, top, x + TILE - 1, top + BAR - 3), fill=_color(label))


def _counts(side: GridSide, classes: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield for each attribute how many images show each class."""
    for column, names in enumerate(classes.values()):
        labels = side.classes[side.has_face, column].tolist()
        parts = [f"{labels.count(index)} {name}" for index, name in enumerate(names)]
        missing = int((~side.has_face).sum())
        yield ", ".join(parts + ([f"{missing} no face"] if missing else []))


def _legend(pen: ImageDraw.ImageDraw, attribute: str, classes: Sequence[str], place: tuple[int, int]) -> None:
    """Draw the colors of one attribute's classes."""
    x, y = place
    pen.text((x, y), f"perceived {attribute}:", fill=SOFT, font=_font(SMALL))
    x += 20 + round(pen.textlength(f"perceived {attribute}:", font=_font(SMALL)))
    for index, name in [*enumerate(classes), (None, "no face")]:
        pen.rectangle((x, y + 2, x + 14, y + 16), fill=_color(index))
        pen.text((x + 20, y), name, fill=SOFT, font=_font(SMALL))
        x += 44 + round(pen.textlength(name, font=_font(SMALL)))


def _text_widths(rows: Sequence[GridRow], classes: Mapping[str, Sequence[str]]) -> list[int]:
    """Return how wide the figure must be for its legends and prompts."""
    prompts = [2 * MARGIN + _width(row.title(), 14) for row in rows]
    legends = [
        MARGIN + 20 + sum(44 + _width(text, SMALL) for text in (f"perceived {name}:", *names, "no face"))
        for name, names in classes.items()
    ]
    return [*prompts, *legends]


def _width(text: str, size: int) -> int:
    return math.ceil(_font(size).getlength(text))


def _color(index: int | None) -> str:
    return NO_FACE if index is None else PALETTE[index % len(PALETTE)]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
