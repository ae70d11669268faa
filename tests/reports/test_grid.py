"""The geometry of the before/after figure."""

import pytest
import torch
from PIL import Image, ImageColor
from torch import Tensor

from fairness_dft.reports.grid import BAR, GAP, MARGIN, NO_FACE, PALETTE, TILE, GridRow, GridSide, comparison_grid

GREYS = (40, 90, 140, 190, 240)
CLASSES = ("man", "woman")


def plain(grey: int) -> Tensor:
    return torch.full((3, 8, 8), grey / 255)


def row(classes: dict[str, list[int]]) -> GridRow:
    """One prompt whose i-th image is plain grey number i; a class of -1 stands for no face."""
    sides = {}
    for model, of in classes.items():
        images = torch.stack([plain(grey) for grey, _ in zip(GREYS, of, strict=False)])
        sides[model] = GridSide(images, torch.tensor(of)[:, None], torch.tensor(of) >= 0)
    return GridRow("a chef", sides)


def block_of(picture: Image.Image, side: int, number: int, count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Colours of tile and bar of each image of a model and prompt, in the order they are placed."""
    columns = (count + 1) // 2
    left = MARGIN + side * (columns * (TILE + GAP) + MARGIN)
    top = 84 + number * (22 + 2 * (TILE + BAR + GAP) + 10) + 22
    colours = []
    for place in range(count):
        x, y = left + place % columns * (TILE + GAP), top + place // columns * (TILE + BAR + GAP)
        corners = {picture.getpixel((x + dx, y + dy)) for dx in (0, TILE - 1) for dy in (0, TILE - 1)}
        bar = {picture.getpixel((x + dx, y + TILE + dy)) for dx in (0, TILE - 1) for dy in (0, BAR - 3)}
        assert len(corners) == len(bar) == 1
        colours.append((corners.pop(), bar.pop()))
    return colours


def expected(classes: list[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """By class, images without a face last, otherwise in the order they came."""
    by_class = [[i for i, c in enumerate(classes) if c == k] for k in (0, 1, 2, -1)]
    colour = {k: ImageColor.getrgb(PALETTE[k] if k >= 0 else NO_FACE) for k in (0, 1, 2, -1)}
    return [((GREYS[i],) * 3, colour[classes[i]]) for same in by_class for i in same]


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_images_stand_by_class_with_coloured_bars(count: int) -> None:
    before, after = [1, -1, 0, 1, 0][:count], [0, 1, 2, -1, -1][:count]
    rows = [row({"original": before, "ema": after}), row({"original": after, "ema": before})]
    picture = comparison_grid(rows, {"gender": (*CLASSES, "other")})
    assert block_of(picture, 0, 0, count) == block_of(picture, 1, 1, count) == expected(before)
    assert block_of(picture, 1, 0, count) == block_of(picture, 0, 1, count) == expected(after)
    assert picture.getpixel((picture.width - 1, picture.height - 1)) == (255, 255, 255)


def test_two_attributes_have_a_bar_and_a_legend_each_and_order_the_images() -> None:
    classes = torch.tensor([[1, 0], [0, 1], [0, 0], [1, 1]])
    images = torch.stack([plain(grey) for grey in GREYS[:4]])
    face = torch.tensor([True, True, True, False])
    side = GridSide(images, classes, face)
    rows = [GridRow("a chef", {"original": side, "trained": side, "ema": side})]
    picture = comparison_grid(rows, {"gender": CLASSES, "age": ("young", "old")})
    top = 62 + 2 * 22 + 22
    for place, i in enumerate([2, 1, 0, 3]):
        x, y = MARGIN + place % 2 * (TILE + GAP), top + place // 2 * (TILE + 2 * BAR + GAP)
        assert picture.getpixel((x, y)) == (GREYS[i],) * 3
        for bar in range(2):
            colour = ImageColor.getrgb(PALETTE[classes[i, bar]] if face[i] else NO_FACE)
            assert {picture.getpixel((x, y + TILE + bar * BAR + dy)) for dy in (0, BAR - 3)} == {colour}
    for line in range(2):
        legend = {c for _, c in picture.crop((0, 50 + 22 * line, picture.width, 70 + 22 * line)).getcolors(1 << 16)}
        assert {ImageColor.getrgb(name) for name in (*PALETTE[:2], NO_FACE)} <= legend


def test_the_legend_shows_every_class_and_no_face() -> None:
    picture = comparison_grid([row({"original": [0] * 5, "ema": [0] * 5})], {"gender": CLASSES})
    legend = {colour for _, colour in picture.crop((0, 44, picture.width, 76)).getcolors(1 << 16)}
    for name in (*PALETTE[: len(CLASSES)], NO_FACE):
        assert ImageColor.getrgb(name) in legend
    assert ImageColor.getrgb(PALETTE[2]) not in legend


def test_classes_and_no_face_have_colours_of_their_own() -> None:
    assert len({*PALETTE, NO_FACE}) == len(PALETTE) + 1


def test_pictures_are_wide_enough_for_their_words() -> None:
    narrow = comparison_grid([row({"original": [0]})], {"gender": CLASSES})
    wide = comparison_grid([GridRow("a long prompt " * 9, row({"original": [0]}).sides)], {"gender": CLASSES})
    assert narrow.width > 300 and wide.width > 700


def test_one_model_alone_is_not_called_before() -> None:
    def title(sides: dict[str, list[int]]) -> set[tuple[int, ...]]:
        picture = comparison_grid([row(sides)], {"gender": CLASSES})
        return {colour for _, colour in picture.crop((0, 0, picture.width, 42)).getcolors(1 << 16)}

    assert title({"original": [0, 1]}) == {(255, 255, 255)}
    assert len(title({"original": [0, 1], "ema": [0, 1]})) > 1
