"""Thumbnails of a report: each links to its file and to its line of per_image.csv."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from PIL import Image
from torch import Tensor

from fairness_dft.attributes import attributes_of
from fairness_dft.metrics.image_readings import Readings
from fairness_dft.reports.csv_tables import ImageTable
from fairness_dft.reports.results import AttributeResult

SIZE = 128  # pixels of the longer side


@dataclass(frozen=True)
class Thumbnail:
    """One image.

    Attributes:
        source: The image as a data URL.
        label: The class that is read, or "no face".
        index: Number of that class; None for no face.
        line: Line of per_image.csv.
        link: File of the image, relative to the report; empty if it is not kept.
    """

    source: str
    label: str
    index: int | None
    line: int
    link: str


@dataclass(frozen=True)
class Column:
    """The images of one noise: one of each model.

    Attributes:
        images: By model.
    """

    images: dict[str, Thumbnail]

    @property
    def changed(self) -> bool:
        """Whether the models' images show different classes."""
        return len({image.label for image in self.images.values()}) > 1


def columns(
    index: int,
    images: Mapping[str, Tensor],
    readings: Mapping[str, Readings],
    table: ImageTable,
    label: str,
    result: AttributeResult,
) -> list[Column]:
    """Return the first images of a prompt in columns of one noise each, ordered by class.

    Args:
        index: Index of the prompt.
        images: The first images of each model, with shape (n, 3, H, W), in [0, 1].
        readings: What the shown classifier reads, by model.
        table: The table of images.
        label: The attribute, or product of attributes, that thumbnails show.
        result: Its figures, for the names of its classes.
    """
    count = len(next(iter(images.values())))
    pairs = []
    for number in range(1, count + 1):
        sides = {}
        for model, pixels in images.items():
            line = table.lines[model, index, number]
            place = joint_class(readings[model], index, number, label)
            sides[model] = Thumbnail(
                source=data_url(pixels[number - 1]),
                label="no face" if place is None else result.classes[place],
                index=place,
                line=line,
                link=quote(str(table.rows[line - 2][table.columns.index("file")])),
            )
        pairs.append(Column(sides))
    last = len(result.classes)
    return sorted(
        pairs, key=lambda column: [last if image.index is None else image.index for image in column.images.values()]
    )


def joint_class(readings: Readings, prompt: int, number: int, label: str) -> int | None:
    """Return the class of a prompt's image, counted from 1, by an attribute or product; None for no face."""
    rows = (readings.prompt == prompt).nonzero()[:, 0]
    seeds = list(dict.fromkeys(readings.seed[rows].tolist()))
    row = rows[readings.seed[rows] == seeds[number - 1]][0]
    if not readings.has_face[row]:
        return None
    index = 0
    for name in attributes_of(label):
        probabilities = readings.probabilities[name][row]
        index = index * len(probabilities) + int(probabilities.argmax())
    return index


def count_changes(pairs: Sequence[Column]) -> dict[str, int]:
    """Return how many columns change from which class to which, such as {"man → woman": 3}."""
    counts: dict[str, int] = {}
    for column in pairs:
        if column.changed:
            change = " → ".join(image.label for image in column.images.values())
            counts[change] = counts.get(change, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def data_url(pixels: Tensor) -> str:
    """Return an image with shape (3, H, W), in [0, 1], as a small JPEG inside the page."""
    array = (pixels.detach().float().cpu().clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy()
    image = Image.fromarray(array)
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="jpeg", quality=88, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
