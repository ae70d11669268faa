"""What a run leaves behind: the before/after picture, results.json, and a table in the terminal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fairness_dft.reports.tables import TITLES

# Okabe and Ito's palette, which colour-blind readers can tell apart, and grey for "no face".
PALETTE = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
NO_FACE = "#9A9A9A"
TILE, BAR, GAP, MARGIN = 72, 8, 2, 24


@dataclass(frozen=True)
class GridSide:
    """One model's images of a prompt, and what a judge sees in them.

    Attributes:
        images: with shape (n, 3, H, W), in [0, 1].
        classes: the class of each image by each of the A attributes, int64 with shape (n, A); any value where there
            is no `face`.
        has_face: whether an image shows a face, bool with shape (n,).
    """

    images: Tensor
    classes: Tensor
    has_face: Tensor


@dataclass
class GridRow:
    """One prompt of a before/after picture.

    Attributes:
        prompt: the text.
        sides: what each model made of it, by the model's name.
    """

    prompt: str
    sides: dict[str, GridSide] = field(default_factory=dict)


def comparison_grid(rows: Sequence[GridRow], classes: Mapping[str, Sequence[str]]) -> Image.Image:
    """Draw prompts in rows, one block of images a model, ordered by class, each class with its coloured bar.

    Args:
        rows: the prompts, all with the same models and numbers of images.
        classes: the class names of each attribute, which has a bar and a line of the legend each.
    """
    models = list(rows[0].sides)
    count = len(rows[0].sides[models[0]].has_face)
    columns = (count + 1) // 2
    block = columns * (TILE + GAP)
    row_height = 22 + 2 * (TILE + BAR * len(classes) + GAP) + 10
    head = 62 + 22 * len(classes)
    width = max(MARGIN * (len(models) + 1) + block * len(models), *_text_widths(rows, classes))
    size = (width, head + 12 + row_height * len(rows))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for side, model in enumerate(models):
        left = MARGIN + side * (block + MARGIN)
        if len(models) > 1:  # one alone is neither before nor after
            pen.text((left, 14), TITLES.get(model, model), fill="black", font=_font(22))
        for number, row in enumerate(rows):
            top = head + number * row_height
            if side == 0:
                pen.text((left, top), row.prompt, fill="#333333", font=_font(14))
            _paste_block(canvas, pen, row.sides[model], left, top + 22, columns)
    for line, (attribute, names) in enumerate(classes.items()):
        _legend(pen, attribute, names, (MARGIN, 50 + 22 * line))
    return canvas


def _paste_block(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    side: GridSide,
    left: int,
    top: int,
    columns: int,
) -> None:
    classes = [
        row.tolist() if face else [None] * len(row) for row, face in zip(side.classes, side.has_face, strict=True)
    ]
    order = sorted(range(len(classes)), key=lambda i: (not side.has_face[i], classes[i] if side.has_face[i] else [], i))
    bars = BAR * side.classes.shape[1]
    for place, i in enumerate(order):
        x = left + place % columns * (TILE + GAP)
        y = top + place // columns * (TILE + bars + GAP)
        pixels = (side.images[i].permute(1, 2, 0) * 255).round().byte().numpy()
        canvas.paste(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC), (x, y))
        for bar, index in enumerate(classes[i]):
            y_bar = y + TILE + bar * BAR
            pen.rectangle((x, y_bar, x + TILE + GAP - 1, y_bar + BAR - 3), fill=_colour(index))


def _legend(pen: ImageDraw.ImageDraw, attribute: str, classes: Sequence[str], place: tuple[int, int]) -> None:
    x, y = place
    pen.text((x, y), f"perceived {attribute}:", fill="#333333", font=_font(15))
    x += 20 + round(pen.textlength(f"perceived {attribute}:", font=_font(15)))
    for index, name in [*enumerate(classes), (None, "no face")]:
        pen.rectangle((x, y + 2, x + 14, y + 16), fill=_colour(index))
        pen.text((x + 20, y), name, fill="#333333", font=_font(15))
        x += 44 + round(pen.textlength(name, font=_font(15)))


def _text_widths(rows: Sequence[GridRow], classes: Mapping[str, Sequence[str]]) -> list[int]:
    """How wide a picture must be for its legends and prompts."""
    prompts = [2 * MARGIN + math.ceil(_font(14).getlength(row.prompt)) for row in rows]
    legends = [
        MARGIN
        + 20
        + sum(44 + math.ceil(_font(15).getlength(text)) for text in (f"perceived {name}:", *names, "no face"))
        for name, names in classes.items()
    ]
    return [*prompts, *legends]


def _colour(index: int | None) -> str:
    return NO_FACE if index is None else PALETTE[index % len(PALETTE)]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
