"""Pictures of faces with labels, in the layouts in which they are distributed: what classifiers are trained on.

Every data set becomes the same thing: for each split a list of `LabelledPicture`, and for each head (an attribute such
as gender) its classes in the order of the labels. Labels are what annotators perceived.

References:
    FairFace (Kärkkäinen and Joo, 2021), https://arxiv.org/abs/1908.04913
    CelebA (Liu et al., 2015), https://arxiv.org/abs/1411.7766
    UTKFace (Zhang et al., 2017), https://arxiv.org/abs/1702.08423
"""

import csv
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

SPLITS = ("train", "validation", "test")
UNKNOWN = -100  # a label that is not known; the loss and the metrics leave it out

# The four groups of the paper; WMELH is White, Middle Eastern, Latino Hispanic.
RACES = {
    "White": "WMELH",
    "Middle Eastern": "WMELH",
    "Latino_Hispanic": "WMELH",
    "East Asian": "Asian",
    "Southeast Asian": "Asian",
    "Black": "Black",
    "Indian": "Indian",
}
GENDERS = {"Male": "man", "Female": "woman"}
UTK_GENDERS = ("man", "woman")
UTK_RACES = ("White", "Black", "Asian", "Indian", "Others")


@dataclass(frozen=True)
class LabelledPicture:
    """A picture and the class of each head, by its index, or `UNKNOWN`."""

    file: Path
    labels: dict[str, int]


class LabelledFaces(LightningDataModule, ABC):
    """A data set of labelled pictures.

    A batch is a pair: pictures, uint8 with shape (B, 3, size, size), and for each head int64 with shape (B,).

    Args:
        folder: where the data set lies, as it is distributed.
        batch_size: pictures of a batch, on each GPU.
        workers: processes that read pictures.

    Attributes:
        heads: after `read`, the classes of each head, in the order of the labels.
        pictures: after `read`, those of each split.
        size: side in pixels to which pictures are scaled; set by who trains.
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
    def rows(self) -> list[tuple[str, Path, dict[str, str]]]:
        """Split, file and class names of every picture; a head that a picture has no label for is left out.

        Raises:
            ValueError: if the folder does not hold the data set.
        """

    def read(self) -> None:
        """Fill `heads` and `pictures`.

        Raises:
            ValueError: if there is no data set, no picture to train or validate on, or a head with a single class.
        """
        if self.pictures:
            return
        if not self.folder.is_dir():
            raise ValueError(f"--data: there is no folder {str(self.folder)!r}")
        rows = self.rows()
        names: dict[str, set[str]] = {}
        for _, _, labels in rows:
            for head, name in labels.items():
                names.setdefault(head, set()).add(name)
        self.heads = {head: self.order(head, found) for head, found in names.items()}
        for head, classes in self.heads.items():
            if len(classes) < 2:
                raise ValueError(f"--data: {head} must have two classes or more, but all are {classes[0]!r}")
        index = {head: {name: i for i, name in enumerate(classes)} for head, classes in self.heads.items()}
        self.pictures = {split: [] for split in SPLITS}
        for split, file, labels in rows:
            known = {head: index[head][labels[head]] if head in labels else UNKNOWN for head in self.heads}
            self.pictures[split].append(LabelledPicture(file, known))
        for split in ("train", "validation"):
            if not self.pictures[split]:
                raise ValueError(f"--data: {str(self.folder)!r} has no pictures for the split {split}")
        first = self.pictures["train"][0].file
        if not first.is_file():
            raise ValueError(f"--data: the picture {str(first)!r}, which the labels name, is not there")

    def order(self, head: str, found: set[str]) -> tuple[str, ...]:
        """The classes of a head, in the order of its labels: alphabetical."""
        return tuple(sorted(found))

    def loader(self, split: str) -> DataLoader:
        """Batches of one split, shuffled for training."""
        return DataLoader(
            Pictures(self.pictures[split], self.size),
            self.batch_size,
            shuffle=split == "train",
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

    @override
    def train_dataloader(self) -> DataLoader:
        return self.loader("train")

    @override
    def val_dataloader(self) -> DataLoader:
        return self.loader("validation")

    @override
    def test_dataloader(self) -> DataLoader:
        return self.loader("test")


class Pictures(Dataset):
    """Reads and scales pictures.

    Args:
        pictures: their files and labels.
        size: side in pixels; pictures that are not square are cropped about their middle.
    """

    def __init__(self, pictures: Sequence[LabelledPicture], size: int) -> None:
        self.pictures, self.size = pictures, size

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, int]]:
        """One picture, uint8 with shape (3, size, size), and its labels."""
        entry = self.pictures[index]
        with Image.open(entry.file) as opened:
            picture = opened.convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        scaled = square.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous(), entry.labels


def table(file: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a header.

    Raises:
        ValueError: if it is not there, is not UTF-8 or lacks a column.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            rows = list(reader)
    except OSError:
        raise ValueError(f"--data: there is no file {str(file)!r}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--data: {str(file)!r} is no CSV file in UTF-8: {error}") from None
    if missing := [column for column in required if column not in (reader.fieldnames or ())]:
        raise ValueError(f"--data: {str(file)!r} lacks the column {missing[0]!r}; it has {reader.fieldnames}")
    return rows


def hashed_split(name: str) -> str:
    """A split for a file of a data set without any: a tenth each for validation and test, always the same ones."""
    digit = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    return "test" if digit == 0 else "validation" if digit == 1 else "train"


class FairFace(LabelledFaces):
    """FairFace: fairface_label_train.csv and fairface_label_val.csv beside train/ and val/.

    Its validation split serves as the test split; a tenth of its training split is held out for validation.

    Args:
        folder: where it lies.
        batch_size: pictures of a batch, on each GPU.
        workers: processes that read pictures.
        four_races: the paper's four groups instead of its seven.
        old_from: the age in years, a multiple of ten, from which on a face counts as old.
    """

    def __init__(
        self, folder: str, batch_size: int = 64, workers: int = 4, four_races: bool = True, old_from: int = 40
    ) -> None:
        super().__init__(folder, batch_size, workers)
        if old_from % 10 or not 0 < old_from <= 70:
            raise ValueError(f"`old_from` must be a multiple of 10 up to 70, as FairFace has it, but got {old_from}")
        self.four_races, self.old_from = four_races, old_from

    @override
    def rows(self) -> list[tuple[str, Path, dict[str, str]]]:
        rows = []
        for name in ("train", "val"):
            for row in table(self.folder / f"fairface_label_{name}.csv", ("file", "age", "gender", "race")):
                years = int(row["age"].removeprefix("more than ").partition("-")[0])
                labels = {
                    "gender": GENDERS[row["gender"]],
                    "race": RACES[row["race"]] if self.four_races else row["race"],
                    "age": "old" if years >= self.old_from else "young",
                }
                split = "test" if name == "val" else hashed_split(row["file"])
                rows.append(
                    ("train" if name == "train" and split == "test" else split, self.folder / row["file"], labels)
                )
        return rows


class CelebA(LabelledFaces):
    """CelebA: list_attr_celeba.txt, list_eval_partition.txt and img_align_celeba/.

    Args:
        folder: where it lies.
        batch_size: pictures of a batch, on each GPU.
        workers: processes that read pictures.
        attributes: for each head the attribute of CelebA, with the names of the class that has it and of the other.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int = 64,
        workers: int = 4,
        attributes: Mapping[str, tuple[str, str, str]] | None = None,
    ) -> None:
        super().__init__(folder, batch_size, workers)
        default = {"gender": ("Male", "man", "woman"), "age": ("Young", "young", "old")}
        self.attributes = default if attributes is None else dict(attributes)

    @override
    def rows(self) -> list[tuple[str, Path, dict[str, str]]]:
        try:
            lines = (self.folder / "list_attr_celeba.txt").read_text(encoding="utf-8").splitlines()
            partition = (self.folder / "list_eval_partition.txt").read_text(encoding="utf-8").split()
        except OSError as error:
            raise ValueError(f"--data: there is no file {error.filename!r}") from None
        splits = dict(zip(partition[::2], partition[1::2], strict=True))
        names = lines[1].split()
        if unknown := [entry[0] for entry in self.attributes.values() if entry[0] not in names]:
            raise ValueError(f"--data: CelebA has no attribute {unknown[0]!r}, only {', '.join(names)}")
        rows = []
        for line in lines[2:]:
            file, *values = line.split()
            has = {name: value == "1" for name, value in zip(names, values, strict=True)}
            labels = {head: yes if has[name] else no for head, (name, yes, no) in self.attributes.items()}
            rows.append((SPLITS[int(splits[file])], self.folder / "img_align_celeba" / file, labels))
        return rows


class UTKFace(LabelledFaces):
    """UTKFace: files whose names begin with age_gender_race_; a tenth each is held out for validation and test.

    Args:
        folder: where the pictures lie.
        batch_size: pictures of a batch, on each GPU.
        workers: processes that read pictures.
        old_from: the age in years from which on a face counts as old.
    """

    def __init__(self, folder: str, batch_size: int = 64, workers: int = 4, old_from: int = 40) -> None:
        super().__init__(folder, batch_size, workers)
        self.old_from = old_from

    @override
    def rows(self) -> list[tuple[str, Path, dict[str, str]]]:
        rows = []
        for file in sorted(self.folder.glob("*.jpg")):
            parts = file.name.split("_")
            if len(parts) < 4 or not all(part.isdigit() for part in parts[:3]):
                continue  # a few files of the data set have no complete label
            age, gender, race = map(int, parts[:3])
            if gender > 1 or race > 4:
                continue
            labels = {
                "gender": UTK_GENDERS[gender],
                "race": UTK_RACES[race],
                "age": "old" if age >= self.old_from else "young",
            }
            rows.append((hashed_split(file.name), file, labels))
        if not rows:
            raise ValueError(
                f"--data: {str(self.folder)!r} holds no files such as 25_0_2_20170116174525125.jpg.chip.jpg"
            )
        return rows


class LabelledFolder(LabelledFaces):
    """Any pictures, with a CSV file: columns `file`, optionally `split`, and one for each head.

    An empty cell is a label that is not known. Without `split` (train, validation or test), a tenth each is held out
    for validation and test.

    Args:
        folder: to which the files are relative.
        labels: the CSV file, relative to the folder.
        batch_size: pictures of a batch, on each GPU.
        workers: processes that read pictures.
        classes: the order of a head's classes where it should not be alphabetical.
    """

    def __init__(
        self,
        folder: str,
        labels: str = "labels.csv",
        batch_size: int = 64,
        workers: int = 4,
        classes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(folder, batch_size, workers)
        self.labels, self.classes = labels, dict(classes or {})

    @override
    def rows(self) -> list[tuple[str, Path, dict[str, str]]]:
        file = self.folder / self.labels
        rows = []
        for number, row in enumerate(table(file, ("file",)), start=2):
            name = row.pop("file")
            split = row.pop("split", None) or hashed_split(name)
            if split not in SPLITS:
                raise ValueError(
                    f"--data: {str(file)!r}, line {number}: split must be among {SPLITS}, but got {split!r}"
                )
            if None in row or None in row.values():
                raise ValueError(f"--data: {str(file)!r}, line {number}: it has not as many cells as the header")
            rows.append((split, self.folder / name, {head: label for head, label in row.items() if label}))
        if not any(labels for _, _, labels in rows):
            raise ValueError(f"--data: {str(file)!r} has no labels: give one column for each head beside `file`")
        return rows

    @override
    def order(self, head: str, found: set[str]) -> tuple[str, ...]:
        given = tuple(self.classes.get(head, sorted(found)))
        if set(given) != found:
            raise ValueError(f"--data: `classes` of {head} must be {sorted(found)} in any order, but got {list(given)}")
        return given
