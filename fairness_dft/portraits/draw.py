"""Drawn portraits: an appearance in, a 64 x 64 picture and the place of its face out.

The portraits are caricatures. Long hair and red lips *stand for* "perceived as a woman", a beard for
"perceived as a man", grey hair and wrinkles for "perceived as old". They say nothing about people; they give
the method something to learn from that two cores can train and that anybody can check by looking.

Everything is drawn at four times the size and scaled down, which is what smooths the edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 64
OVERSAMPLING = 4

GENDERS = ("man", "woman")
SKINS = ("light", "tan", "brown", "dark")
AGES = ("young", "old")
VIEWS = ("front", "behind", "empty")

SKIN_COLOURS = {
    "light": (250, 222, 200),
    "tan": (226, 170, 118),
    "brown": (160, 100, 62),
    "dark": (84, 52, 38),
}
HAIR_COLOURS = {
    "young": ((30, 24, 24), (82, 48, 26), (150, 76, 34), (214, 168, 84)),
    "old": ((206, 206, 210), (226, 226, 228)),
}
COLOURS = {
    "red": (204, 44, 44),
    "orange": (240, 140, 36),
    "yellow": (244, 214, 60),
    "green": (56, 150, 70),
    "teal": (40, 160, 170),
    "blue": (48, 92, 196),
    "purple": (126, 62, 168),
    "pink": (238, 130, 180),
    "white": (244, 244, 244),
    "black": (44, 44, 50),
}
BACKGROUNDS = ("plain", "horizon", "shelves", "tiles", "stripes", "window", "dots", "diagonal")
CLOTHES = ("tee", "suit", "apron", "vest", "scrubs", "turtleneck", "uniform", "striped", "coat")
HEADWEAR = ("none", "cap", "hardhat", "toque", "beret", "straw", "headphones", "bandana", "peaked")

PLACES = (-8, 0, 8)  # of a portrait, to the sides of the middle, in pixels: by the stride of the autoencoder

# Of a face, in portrait coordinates: the corners of its box, its eyes, nose and the corners of its mouth.
FACE = [(19.5, 16.5), (44.5, 47.0)]
LANDMARKS = [(26.8, 30.1), (37.2, 30.1), (32.0, 35.4), (28.4, 40.0), (35.6, 40.0)]

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """What a subject decides: kinds and colours of background, clothes and headwear."""

    background: str
    background_colour: str
    clothes: str
    clothes_colour: str
    headwear: str
    headwear_colour: str


@dataclass(frozen=True)
class Appearance:
    """Who is drawn, and how: perceived attributes, the subject's look, and the view."""

    gender: str
    skin: str
    age: str
    look: Look
    view: str = "front"


@dataclass(frozen=True)
class Drawing:
    """A picture, and where its face is.

    Attributes:
        picture: uint8, with shape (64, 64, 3).
        box: Left, top, right, bottom of the face in pixels, with shape (4,); None if no face is seen.
        landmarks: x and y of left and right eye, nose, left and right corner of the mouth, as seen in the picture, with
            shape (5, 2); None if no face is seen.
    """

    picture: NDArray[np.uint8]
    box: NDArray[np.float64] | None = None
    landmarks: NDArray[np.float64] | None = None


def draw(appearance: Appearance, random: Generator, anywhere: bool = False) -> Drawing:
    """Draw one portrait; place, size, colours and details are jittered by `random`.

    Args:
        appearance: Who and what is drawn.
        random: The source of all jitter; the same state gives the same picture.
        anywhere: The face is at any place and size, from a third of the frame's height, instead of near one of
            `PLACES`.
    """
    canvas = Image.new("RGB", (SIZE * OVERSAMPLING,) * 2)
    pen = Pen(canvas, random)
    look = appearance.look
    _background(pen, look.background, pen.shade(COLOURS[look.background_colour], 7, wash=0.45))
    if appearance.view == "empty":
        return Drawing(_finish(canvas))
    if anywhere:
        scale = random.uniform(0.6, 1.15)
        room = 32 - 15 * scale  # between the sides of the head and of the frame
        pen.place(random.uniform(-room, room), random.uniform(-24 + 22 * scale, 26 - 18 * scale), scale)
    else:
        dx, dy = random.uniform((-3, -1.5), (3, 2))
        pen.place(random.choice(PLACES) + dx, dy, random.uniform(0.9, 1.1))
    skin = pen.shade(SKIN_COLOURS[appearance.skin], 6)
    palette = HAIR_COLOURS[appearance.age]
    hair = pen.shade(palette[random.integers(len(palette))], 7)
    behind = appearance.view == "behind"
    if appearance.gender == "woman":
        _long_hair(pen, hair)
    _clothes(pen, look.clothes, pen.shade(COLOURS[look.clothes_colour], 7), skin, behind)
    _head(pen, skin)
    if behind:
        _back_of_head(pen, hair, appearance.gender)
    else:
        _features(pen, appearance, skin, hair)
    _headwear(pen, look.headwear, pen.shade(COLOURS[look.headwear_colour], 7), behind)
    if behind:
        return Drawing(_finish(canvas))
    box, landmarks = (np.divide(pen.points(points), OVERSAMPLING) for points in (FACE, LANDMARKS))
    return Drawing(_finish(canvas), box.ravel(), landmarks)


class Pen:
    """Draws in portrait coordinates (64 units a side), moved and scaled about the head."""

    def __init__(self, canvas: Image.Image, random: Generator) -> None:
        self.draw = ImageDraw.Draw(canvas)
        self.random = random
        self.dx, self.dy, self.scale = 0.0, 0.0, 1.0

    def place(self, dx: float, dy: float, scale: float) -> None:
        """Move what follows by (dx, dy) units and scale it about the middle of the picture."""
        self.dx, self.dy, self.scale = dx, dy, scale

    def shade(self, colour: Colour, spread: float, wash: float = 0.0) -> Colour:
        """Jitter a colour by a normal `spread` (0 to 255) and mix it with `wash` (0 to 1) of light grey."""
        jittered = np.asarray(colour) * (1 - wash) + 215 * wash + self.random.normal(0, spread, 3)
        return cast(Colour, tuple(int(c) for c in np.clip(jittered, 0, 255)))

    def points(self, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Portrait coordinates to canvas pixels."""
        s = OVERSAMPLING
        return [
            (((x - 32) * self.scale + 32 + self.dx) * s, ((y - 32) * self.scale + 32 + self.dy) * s) for x, y in points
        ]

    def polygon(self, points: Sequence[tuple[float, float]], colour: Colour) -> None:
        """Fill a polygon."""
        self.draw.polygon(self.points(points), fill=colour)

    def ellipse(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fill an ellipse within a box."""
        self.draw.ellipse(self.points([(left, top), (right, bottom)]), fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fill a rectangle."""
        self.draw.rectangle(self.points([(left, top), (right, bottom)]), fill=colour)

    def line(self, points: Sequence[tuple[float, float]], width: float, colour: Colour) -> None:
        """Draw a line `width` units wide."""
        self.draw.line(self.points(points), fill=colour, width=round(width * OVERSAMPLING * self.scale))

    def arc(
        self, box: tuple[float, float, float, float], start: float, end: float, width: float, colour: Colour
    ) -> None:
        """Draw part of an ellipse's outline, angles in degrees clockwise from the right."""
        corners = self.points([box[:2], box[2:]])
        self.draw.arc(corners, start, end, fill=colour, width=round(width * OVERSAMPLING * self.scale))

    def pie(self, box: tuple[float, float, float, float], start: float, end: float, colour: Colour) -> None:
        """Fill a chord of an ellipse."""
        self.draw.chord(self.points([box[:2], box[2:]]), start, end, fill=colour)


def darker(colour: Colour, factor: float = 0.72) -> Colour:
    """Return the same color in shadow."""
    return cast(Colour, tuple(int(c * factor) for c in colour))


def _finish(canvas: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


def _background(pen: Pen, kind: str, colour: Colour) -> None:
    pen.box(0, 0, 64, 64, colour)
    dark, shift = darker(colour, 0.74), pen.random.uniform(-2, 2)
    x: float
    if kind == "horizon":
        pen.box(0, 0, 64, 26 + shift, (188, 222, 246))
    elif kind == "shelves":
        for y in (10, 24, 38, 52):
            pen.box(0, y + shift, 64, y + 3 + shift, dark)
    elif kind == "tiles":
        for at in (6, 20, 34, 48, 62):
            pen.box(0, at + shift, 64, at + 1.4 + shift, (250, 250, 250))
            pen.box(at + shift, 0, at + 1.4 + shift, 64, (250, 250, 250))
    elif kind == "stripes":
        for x in (0, 14, 28, 42, 56):
            pen.box(x + shift, 0, x + 6 + shift, 64, dark)
    elif kind == "window":
        pen.box(4 + shift, 5, 20 + shift, 34, (232, 244, 252))
        pen.box(44 + shift, 5, 60 + shift, 34, (232, 244, 252))
        for x in (11.2, 51.2):
            pen.box(x + shift, 5, x + 1.6 + shift, 34, dark)
    elif kind == "dots":
        for x in (6, 22, 42, 58):
            for y in (8, 24, 40, 56):
                pen.ellipse(x - 3.2 + shift, y - 3.2, x + 3.2 + shift, y + 3.2, dark)
    elif kind == "diagonal":
        for x in (-52, -28, -4, 20, 44):
            pen.polygon([(x + shift, 64), (x + 10 + shift, 64), (x + 74 + shift, 0), (x + 64 + shift, 0)], dark)


def _clothes(pen: Pen, kind: str, colour: Colour, skin: Colour, behind: bool) -> None:
    shadow = darker(colour)
    pen.box(27, 40, 37, 52, darker(skin, 0.88))
    shoulders = [(4, 160), (4, 80), (7, 56), (16, 50), (27, 47.5), (37, 47.5), (48, 50), (57, 56), (60, 80), (60, 160)]
    white = (246, 246, 246)
    base = white if kind in ("apron", "coat") else colour
    pen.polygon(shoulders, base)
    if kind == "turtleneck":
        pen.box(25.5, 43, 38.5, 50, colour)
        pen.line([(25.5, 46.5), (38.5, 46.5)], 1, shadow)
    elif kind == "vest":
        for x in (15, 43):
            pen.box(x, 48, x + 6, 160, (250, 240, 90))
        pen.box(6, 58, 58, 62, (235, 235, 235))
    elif kind == "striped":
        for y in (50, 55, 60, 65):
            pen.box(9, y, 55, y + 2.4, white)
    if behind:
        return
    if kind in ("tee", "striped", "vest"):
        pen.ellipse(26, 43.5, 38, 52, darker(skin, 0.88))
    elif kind == "suit":
        pen.polygon([(25, 47), (39, 47), (32, 66)], white)
        pen.polygon([(30.3, 50), (33.7, 50), (34.6, 64), (32, 67), (29.4, 64)], darker(colour, 0.45))
        pen.line([(24.5, 47), (31, 68)], 1.4, shadow)
        pen.line([(39.5, 47), (33, 68)], 1.4, shadow)
    elif kind == "apron":
        pen.polygon([(21, 55), (43, 55), (47, 80), (47, 160), (17, 160), (17, 80)], colour)
        pen.line([(22, 56), (25, 47)], 2, colour)
        pen.line([(42, 56), (39, 47)], 2, colour)
    elif kind == "scrubs":
        pen.polygon([(26, 46.5), (38, 46.5), (32, 58)], darker(skin, 0.88))
        pen.line([(25.5, 46.5), (32, 58.5), (38.5, 46.5)], 1.6, shadow)
    elif kind == "uniform":
        for y in (53, 58, 63):
            pen.ellipse(30.8, y, 33.2, y + 2.4, (250, 220, 90))
        pen.polygon([(25, 47), (32, 52), (27, 54)], shadow)
        pen.polygon([(39, 47), (32, 52), (37, 54)], shadow)
        pen.box(39, 56, 46, 59, (250, 220, 90))
    elif kind == "coat":
        pen.polygon([(26, 47), (38, 47), (35.5, 80), (35.5, 160), (28.5, 160), (28.5, 80)], colour)
        pen.line([(26, 47), (29.5, 66)], 1.2, (190, 190, 196))
        pen.line([(38, 47), (34.5, 66)], 1.2, (190, 190, 196))


def _long_hair(pen: Pen, hair: Colour) -> None:
    width, length = pen.random.uniform(15.5, 17.5), pen.random.uniform(51, 57)
    pen.ellipse(32 - width, 11, 32 + width, 46, hair)
    pen.polygon([(32 - width, 28), (32 + width, 28), (32 + width + 1, length), (32 - width - 1, length)], hair)


def _head(pen: Pen, skin: Colour) -> None:
    pen.ellipse(18.6, 27.5, 22.4, 35, darker(skin, 0.92))
    pen.ellipse(41.6, 27.5, 45.4, 35, darker(skin, 0.92))
    pen.ellipse(20, 15, 44, 47, skin)


def _back_of_head(pen: Pen, hair: Colour, gender: str) -> None:
    pen.ellipse(19.5, 13.5, 44.5, 46 if gender == "woman" else 42, hair)
    if gender == "woman":
        pen.box(20, 30, 44, 54, hair)


def _features(pen: Pen, appearance: Appearance, skin: Colour, hair: Colour) -> None:
    random, woman, old = pen.random, appearance.gender == "woman", appearance.age == "old"
    line = darker(skin, 0.58)
    fringe = random.uniform(22.5, 24.5)
    pen.pie((19, 12.5, 45, 43), 180 + fringe, 360 - fringe, hair)
    pen.polygon([(19.4, 21), (22.5, 20), (21.6, 31 if not woman else 36), (19.2, 31 if not woman else 36)], hair)
    pen.polygon([(44.6, 21), (41.5, 20), (42.4, 31 if not woman else 36), (44.8, 31 if not woman else 36)], hair)
    eye = darker((70, 50, 40), random.uniform(0.4, 1.0))
    for x in (26.8, 37.2):
        pen.ellipse(x - 2.7, 28.2, x + 2.7, 32, (250, 250, 250))
        pen.ellipse(x - 1.5, 28.4, x + 1.5, 31.8, eye)
        brow = random.uniform(25, 25.8)
        pen.line([(x - 3, brow), (x + 3, brow)], 0.9 if woman else 1.7, darker(hair, 0.7))
        if woman:
            pen.arc((x - 3.2, 27.2, x + 3.2, 33), 190, 350, 1.1, (20, 16, 16))
    pen.line([(32, 30), (31, 35.4), (33, 35.6)], 0.9, line)
    if woman:
        pen.ellipse(28, 38.2, 36, 42, (196, 40, 66))
        pen.line([(28.4, 40), (35.6, 40)], 0.6, (120, 16, 36))
    else:
        _beard(pen, hair)
        pen.line([(28.6, 40), (35.4, 40)], 1.3, darker((150, 80, 70), 0.8))
    if old:
        for y in (21.6, 23.4):
            pen.line([(27, y), (37, y)], 0.6, line)
        pen.arc((22.6, 31, 29.4, 36.2), 30, 120, 0.8, line)
        pen.arc((34.6, 31, 41.4, 36.2), 60, 150, 0.8, line)
        pen.line([(26.2, 36.2), (25.2, 41)], 0.8, line)
        pen.line([(37.8, 36.2), (38.8, 41)], 0.8, line)


def _beard(pen: Pen, hair: Colour) -> None:
    style = pen.random.random()
    if style < 0.45:
        pen.pie((20.2, 24, 43.8, 48.5), 12, 168, hair)
        pen.ellipse(27.6, 37.6, 36.4, 42, darker(hair, 0.9))
    else:
        pen.polygon([(27, 38.6), (32, 36.6), (37, 38.6), (36, 39.4), (28, 39.4)], hair)


def _headwear(pen: Pen, kind: str, colour: Colour, behind: bool) -> None:
    shadow = darker(colour)
    if kind == "cap":
        pen.pie((18.6, 8, 45.4, 34), 180, 360, colour)
        if not behind:
            pen.ellipse(19, 18.4, 45, 23.4, shadow)
    elif kind == "hardhat":
        pen.pie((17.6, 5, 46.4, 35), 180, 360, colour)
        pen.box(15.4, 18.4, 48.6, 21.4, shadow)
        pen.box(30, 4.6, 34, 19, shadow)
    elif kind == "toque":
        for x in (17, 24, 31):
            pen.ellipse(x, 0, x + 16, 14, colour)
        pen.box(21, 8, 43, 20, colour)
        pen.box(21, 16.6, 43, 20.4, shadow)
    elif kind == "beret":
        pen.polygon([(17, 20), (16, 13), (26, 7), (44, 8.5), (51, 16), (46, 20)], colour)
        pen.box(19.4, 18, 44.6, 20.6, shadow)
    elif kind == "straw":
        pen.ellipse(8, 15, 56, 24, shadow)
        pen.pie((20, 4, 44, 32), 180, 360, colour)
        pen.box(20, 14.6, 44, 18, colour)
    elif kind == "headphones":
        pen.arc((17, 8, 47, 46), 182, 358, 2.6, colour)
        pen.box(15, 25, 20, 36, colour)
        pen.box(44, 25, 49, 36, colour)
    elif kind == "bandana":
        pen.pie((18.8, 10, 45.2, 36), 182, 358, colour)
        for x in (24, 32, 40):
            pen.ellipse(x - 1.4, 14, x + 1.4, 16.8, (250, 250, 250))
    elif kind == "peaked":
        pen.polygon([(15, 12), (24, 5), (40, 5), (49, 12), (45, 17), (19, 17)], colour)
        pen.box(19, 16, 45, 20, shadow)
        pen.ellipse(30, 9, 34, 13, (250, 220, 90))
        if not behind:
            pen.pie((20, 15, 44, 25), 0, 180, (36, 36, 40))
