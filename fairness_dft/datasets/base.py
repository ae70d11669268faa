"""Labeled images of faces, on which classifiers are trained.

Every data set has the same form: for each split a list of `LabelledPicture`, and for each head (an attribute such as
gender) its classes in the order of the labels. Labels are what annotators perceived. This module has what all data sets
share, and the data set that is any folder with a table; `datasets.faces` has those with layouts of their own.
"""

import csv
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import LightningDataModule
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from typing_extensions import override

from fairness_dft.files import one_line

SPLITS = ("train", "validation", "test")
UNKNOWN = -100  # an unknown label, which the loss and the metrics ignore

Row = tuple[str, Path, dict[str, str | None]]  # split, file, and for each head the name of a class, if known


@dataclass(frozen=True)
class LabelledPicture:
    """An image and the index of the class of each head, or `UNKNOWN`."""

    file: Path
    labels: dict[str, int]


class LabelledFaces(LightningDataModule, ABC):
    """A data set of labeled images.

    A batch is a pair: images, uint8 with shape (B, 3, size, size), and for each head int64 with shape (B,).

    Args:
        folder: Folder of the data set, as it is distributed.
        batch_size: Images per batch, on each GPU.
        workers: Processes that read images.

    Attributes:
        heads: After `read`, the classes of each head, in the order of the labels.
        pictures: After `read`, the images of each split.
        size: Side in pixels to which images are scaled; the training sets it.
    """

    def __init__(self, folder: str, batch_size: int = 64, workers: int = 4) -> None:
        super().__init__()
        if batch_size < 1 or workers < 0:
            raise ValueError(
                f"`batch_size` must be positive and `workers` not negative, but got {batch_size} and {workers}"
            )
        self.folder, self.batch_size, self.workers = Path(folder).expanduser(), batch_size, workers
        self.heads: dict[str, tuple[str, ...]] = {}
        self.pictures: dict[str, list[LabelledPicture]] = {}
        self.size = 224

    @abstractmethod
    def rows(self) -> list[Row]:
        """Return split, file and class names of every image; a head without a label is None or missing.

        Raises:
            ValueError: If the folder does not contain the data set.
        """

    def read(self) -> None:
        """Fill `heads` and `pictures`.

        Raises:
            ValueError: If there is no data set, an image is missing, the split train or validation is empty, or a class
                is missing in the split train.
        """
        if self.pictures:
            return
        if not self.folder.is_dir():
            raise ValueError(f"--data: there is no folder {str(self.folder)!r}")
        rows = self.rows()
        if missing := [(split, file) for split, file, _ in rows if not file.is_file()]:
            split, file = missing[0]
            raise ValueError(
                f"--data: {len(missing)} of {len(rows)} images that the labels name do not exist, such as "
                f"{str(file)!r} of the split {split}"
            )
        names: dict[str, set[str]] = {}
        for _, _, labels in rows:
            for head, name in labels.items():
                names.setdefault(head, set()).update(cast(set[str], {name} - {None}))
        names = {head: classes for head, classes in names.items() if classes}
        if invalid := [head for head in names if not head or set("/×") & set(head)]:
            raise ValueError(f"--data: the name of a head must not be empty or contain / or ×, but got {invalid[0]!r}")
        self.heads = {head: self.order(head, classes) for head, classes in names.items()}
        index = {head: {name: i for i, name in enumerate(classes)} for head, classes in self.heads.items()}
        pictures: dict[str, list[LabelledPicture]] = {split: [] for split in SPLITS}
        for split, file, labels in rows:
            known = {
                head: cast(dict[str | None, int], index[head]).get(labels.get(head), UNKNOWN) for head in self.heads
            }
            pictures[split].append(LabelledPicture(file, known))
        for split in ("train", "validation"):
            if not pictures[split]:
                raise ValueError(f"--data: {str(self.folder)!r} has no images for the split {split}")
        for head, classes in self.heads.items():
            if len(classes) < 2:
                raise ValueError(f"--data: {head} must have two classes or more, but all are {classes[0]!r}")
            trained = {picture.labels[head] for picture in pictures["train"]}
            if lacking := [name for i, name in enumerate(classes) if i not in trained]:
                raise ValueError(f"--data: the split train has no image of {head} {lacking[0]!r}")
        self.pictures = pictures

    def order(self, head: str, names: set[str]) -> tuple[str, ...]:
        """Return the classes of a head in the order of its labels: alphabetical.

        Args:
            head: The head.
            names: Names of its classes.
        """
        return tuple(sorted(names))

    def loader(self, split: str) -> DataLoader[Any]:
        """Return batches of one split: shuffled for training; else each rank reads every n-th image, none twice."""
        pictures: Pictures | Subset[tuple[Tensor, dict[str, int]]] = Pictures(self.pictures[split], self.size)
        trainer = self.trainer
        ranks = trainer.world_size if trainer else 1
        training = split == "train"
        sampler: DistributedSampler[tuple[Tensor, dict[str, int]]] | None = None
        if training and trainer and ranks > 1:
            sampler = DistributedSampler(pictures, ranks, trainer.global_rank)
        elif trainer and ranks > 1:
            pictures = Subset(pictures, range(trainer.global_rank, len(pictures), ranks))
        return DataLoader(
            pictures,
            self.batch_size,
            shuffle=training and sampler is None,
            sampler=sampler,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            drop_last=training and len(pictures) >= self.batch_size * ranks,
        )

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader("train")

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader("validation")

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.tested)

    @property
    def tested(self) -> str:
        """The split on which figures are measured: test or, if it is empty, validation."""
        return "test" if self.pictures["test"] else "validation"


class Pictures(Dataset[tuple[Tensor, dict[str, int]]]):
    """Read and scale images.

    Args:
        pictures: Files and labels of the images.
        size: Side in pixels; images that are not square are cropped to their center.
    """

    def __init__(self, pictures: Sequence[LabelledPicture], size: int) -> None:
        self.pictures, self.size = pictures, size

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, int]]:
        """Return an image, uint8 with shape (3, size, size), and its labels.

        Raises:
            ValueError: If the file cannot be read.
        """
        entry = self.pictures[index]
        try:
            with Image.open(entry.file) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGB")
        except Exception as error:  # each format raises its own
            raise ValueError(f"--data: the image {str(entry.file)!r} cannot be read: {one_line(error)}") from error
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        scaled = square.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous(), entry.labels


def table(file: Path, required: Sequence[str] = ()) -> list[tuple[str, dict[str, str]]]:
    """Return the rows of a CSV file with a header, each with its file and line number for errors.

    Raises:
        ValueError: If it does not exist, is not UTF-8, lacks a column, or has rows of another length than the header.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            rows = [(f"{str(file)!r}, line {reader.line_num}", row) for row in reader]
            columns = list(reader.fieldnames or ())
    except OSError:
        raise ValueError(f"--data: there is no file {str(file)!r}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--data: {str(file)!r} is not a CSV file in UTF-8: {error}") from None
    if missing := [column for column in required if column not in columns]:
        raise ValueError(
            f"--data: {str(file)!r} lacks the column {missing[0]!r}; it has {', '.join(columns) or 'none'}"
        )
    if len(set(columns)) < len(columns):
        raise ValueError(f"--data: {str(file)!r} has two columns of the same name")
    for where, row in rows:
        if None in row or None in row.values():
            raise ValueError(f"--data: {where}: its number of cells differs from the header's")
    return rows


def allowed(where: str, column: str, value: str, names: Mapping[str, Any]) -> Any:
    """Return the value that a cell stands for.

    Args:
        where: File and line of the cell, for errors.
        column: Name of its column.
        value: Its text.
        names: The allowed texts, and the value of each.

    Raises:
        ValueError: If the text is not allowed.
    """
    if value not in names:
        raise ValueError(f"--data: {where}: {column} must be one of {', '.join(names)}, but got {value!r}")
    return names[value]


def hashed_split(name: str) -> str:
    """Return the split of a file in a data set without splits: a tenth each for validation and test, by its hash."""
    digit = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    return "test" if digit == 0 else "validation" if digit == 1 else "train"


class LabelledFolder(LabelledFaces):
    """Any images, with a CSV file: columns `file`, optionally `split`, and one for each head.

    An empty cell is an unknown label. Without `split` (train, validation or test), a tenth each is held out for
    validation and test.

    Args:
        folder: The folder to which the files are relative.
        labels: The CSV file, relative to the folder.
        batch_size: Images per batch, on each GPU.
        workers: Processes that read images.
        columns: The columns that are heads; by default all columns except `file` and `split`.
        classes: The order of a head's classes where it should not be alphabetical.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> rows = ["file,split,glasses", "a.png,train,no", "b.png,train,yes", "c.png,validation,no"]
        >>> _ = (folder / "labels.csv").write_text(chr(10).join(rows))
        >>> for name in ("a.png", "b.png", "c.png"):
        ...     Image.new("RGB", (32, 32)).save(folder / name)
        >>> data = LabelledFolder(str(folder))
        >>> data.read()
        >>> data.heads
        {'glasses': ('no', 'yes')}
    """

    def __init__(
        self,
        folder: str,
        labels: str = "labels.csv",
        batch_size: int = 64,
        workers: int = 4,
        columns: Sequence[str] | None = None,
        classes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(folder, batch_size, workers)
        self.labels, self.columns, self.classes = labels, columns, dict(classes or {})

    @override
    def rows(self) -> list[Row]:
        file = self.folder / self.labels
        rows: list[Row] = []
        splits: dict[str, str] = {}
        for where, row in table(file, ("file", *(self.columns or ()))):
            name = row["file"]
            split = row.get("split") or hashed_split(name)
            allowed(where, "split", split, dict.fromkeys(SPLITS))
            if not name or splits.setdefault(name, split) != split:
                raise ValueError(f"--data: {where}: file must be given, and in one split, but got {name!r}")
            heads = self.columns or [column for column in row if column not in ("file", "split")]
            rows.append((split, self.folder / name, {head: row[head] or None for head in heads}))
        if not any(name for _, _, labels in rows for name in labels.values()):
            raise ValueError(f"--data: {str(file)!r} has no labels: add one column for each head beside `file`")
        return rows

    @override
    def order(self, head: str, names: set[str]) -> tuple[str, ...]:
        given = tuple(self.classes.get(head, sorted(names)))
        if set(given) != names:
            raise ValueError(f"--data: `classes` of {head} must be {sorted(names)} in any order, but got {list(given)}")
        return given
