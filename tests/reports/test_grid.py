"""The geometry of the before/after figure."""

import pytest
import torch
from PIL import Image, ImageColor
from torch import Tensor

from fairness_dft.reports.grid import (
    BAR,
    MARGIN,
    NO_FACE,
    PALETTE,
    TILE,
    GridRow,
    GridSide,
    _counts,
    comparison_grid,
    layout,
)

GRAYS = (40, 90, 140, 190, 240)
CLASSES = ("man", "woman")


def plain(gray: int) -> Tensor:
    return torch.full((3, 8, 8), gray / 255)


def row(classes: dict[str, list[int]]) -> GridRow:
    """One prompt whose i-th image is plain gray number i; a class of -1 stands for no face."""
    sides = {}
    for model, of in classes.items():
        images = torch.stack([plain(gray) for gray, _ in zip(GRAYS, of, strict=False)])
        sides[model] = GridSide(images, torch.tensor(of)[:, None], torch.tensor(of) >= 0)
    return GridRow("a chef", sides)


def drawn(picture: Image.Image, rows: list[GridRow], prompt: int, model: int) -> list[tuple]:
    """Return the colors of tile and bars of each image of a prompt and model, from left to right."""
    where = layout(rows, attributes := next(iter(rows[0].sides.values())).classes.shape[1])
    colors = []
    for column in range(where.columns):
        x, y = where.place(prompt, model, column)
        corners = {picture.getpixel((x + dx, y + dy)) for dx in (0, TILE - 1) for dy in (0, TILE - 1)}
        assert len(corners) == 1
        tile = corners.pop()
        for bar in range(attributes):
            top = y + TILE + bar * BAR
            found = {picture.getpixel((x + dx, top + dy)) for dx in (0, TILE - 1) for dy in (0, BAR - 3)}
            assert len(found) == 1
            tile = (*tile, found.pop())
        colors.append(tile)
    return colors


def color(label: int) -> tuple[int, ...]:
    return ImageColor.getrgb(PALETTE[label] if label >= 0 else NO_FACE)


@pytest.mark.parametrize(
    ("before", "after", "order"),
    [([1], [0], [0]), ([1, 0], [1, 1], [1, 0]), ([1, -1, 0, 1, 0], [1, 1, 2, 0, -1], [2, 4, 3, 0, 1])],
)
def test_a_column_is_one_noise_and_columns_stand_by_class(
    before: list[int], after: list[int], order: list[int]
) -> None:
    """Columns stand by the class before, then after; no face comes last."""
    rows = [row({"original": before, "ema": after}), row({"original": after, "ema": before})]
    picture = comparison_grid(rows, {"gender": (*CLASSES, "other")})
    for line, labels in enumerate((before, after)):
        assert drawn(picture, rows, 0, line) == [(*(GRAYS[i],) * 3, color(labels[i])) for i in order]
    above, below = (drawn(picture, rows, 1, line) for line in (0, 1))
    assert [tile[:3] for tile in above] == [tile[:3] for tile in below]
    assert picture.getpixel((picture.width - 1, picture.height - 1)) == (255, 255, 255)


def test_each_attribute_has_a_bar_and_a_line_of_the_legend_and_orders_the_images() -> None:
    classes = torch.tensor([[1, 0], [0, 1], [0, 0], [1, 1]])
    images = torch.stack([plain(gray) for gray in GRAYS[:4]])
    face = torch.tensor([True, True, True, False])
    side = GridSide(images, classes, face)
    rows = [GridRow("a chef", {"original": side, "trained": side, "ema": side})]
    picture = comparison_grid(rows, {"gender": CLASSES, "age": ("young", "old")})
    for model in range(3):
        expected = [
            (*(GRAYS[i],) * 3, *(color(int(classes[i, bar]) if face[i] else -1) for bar in range(2)))
            for i in (2, 1, 0, 3)
        ]
        assert drawn(picture, rows, 0, model) == expected
    for line in range(2):
        legend = {c for _, c in picture.crop((0, 10 + 22 * line, picture.width, 30 + 22 * line)).getcolors(1 << 16)}
        assert {ImageColor.getrgb(name) for name in (*PALETTE[:2], NO_FACE)} <= legend


def test_changes_and_classes_are_counted() -> None:
    pair = row({"original": [1, -1, 0, 1, 0], "ema": [1, 1, 1, 0, -1]})
    assert pair.title() == "a chef   (4 of 5 change class)"
    assert row({"original": [1, 0]}).title() == "a chef"
    assert list(_counts(pair.sides["original"], {"gender": CLASSES})) == ["2 man, 2 woman, 1 no face"]
    assert list(_counts(row({"ema": [1, 1]}).sides["ema"], {"gender": CLASSES})) == ["0 man, 2 woman"]


def test_the_legend_shows_every_class_and_no_face() -> None:
    picture = comparison_grid([row({"original": [0] * 5, "ema": [0] * 5})], {"gender": CLASSES})
    legend = {found for _, found in picture.crop((0, 0, picture.width, 38)).getcolors(1 << 16)}
    for name in (*PALETTE[: len(CLASSES)], NO_FACE):
        assert ImageColor.getrgb(name) in legend
    assert ImageColor.getrgb(PALETTE[2]) not in legend


def test_classes_and_no_face_have_colors_of_their_own() -> None:
    assert len({*PALETTE, NO_FACE}) == len(PALETTE) + 1


def test_figures_are_wide_enough_for_their_words() -> None:
    narrow = comparison_grid([row({"original": [0]})], {"gender": CLASSES})
    wide = comparison_grid([GridRow("a long prompt " * 9, row({"original": [0]}).sides)], {"gender": CLASSES})
    assert narrow.width > 300 and wide.width > 700


def test_one_model_alone_has_no_title() -> None:
    alone, pair = [row({"original": [0, 1]})], [row({"original": [0, 1], "ema": [0, 1]})]
    assert layout(alone, 1).left == MARGIN and layout(pair, 1).left > MARGIN + 100
    picture = comparison_grid(pair, {"gender": CLASSES})
    _, top = layout(pair, 1).place(0, 0, 0)
    edge = picture.crop((0, top, layout(pair, 1).left, top + TILE)).getcolors(1 << 16)
    assert len(edge) > 1  # the model's name
