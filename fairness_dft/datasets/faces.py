"""Data sets of labeled faces, in the layouts in which they are distributed.

References:
    FairFace (Kärkkäinen and Joo, 2021), https://arxiv.org/abs/1908.04913, https://github.com/joojs/fairface
    CelebA (Liu et al., 2015), https://arxiv.org/abs/1411.7766
    UTKFace (Zhang et al., 2017), https://arxiv.org/abs/1702.08423
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from typing_extensions import override

from fairness_dft.datasets.base import SPLITS, LabelledFaces, Row, allowed, hashed_split, table

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
AGES = ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70")
UTK_GENDERS = ("man", "woman")
UTK_RACES = ("White", "Black", "Asian", "Indian", "Others")


class FairFace(LabelledFaces):
    """FairFace: fairface_label_train.csv and fairface_label_val.csv beside train/ and val/.

    Its validation split serves as the test split; a tenth of its training split is held out for validation.

    Args:
        folder: Folder of the data set.
        batch_size: Images per batch, on each GPU.
        workers: Processes that read images.
        four_races: Whether to use the paper's four groups instead of FairFace's seven.
        old_from: The age in years, a multiple of ten, from which a face counts as old.

    Example:
        >>> data = FairFace("fairface", old_from=50)  # reads nothing
        >>> data.read()
        Traceback (most recent call last):
        ...
        ValueError: --data: there is no folder 'fairface'
    """

    def __init__(
        self, folder: str, batch_size: int = 64, workers: int = 4, four_races: bool = True, old_from: int = 40
    ) -> None:
        super().__init__(folder, batch_size, workers)
        if old_from % 10 or not 0 < old_from <= 70:
            raise ValueError(f"`old_from` must be a multiple of 10 up to 70, as in FairFace, but got {old_from}")
        self.four_races, self.old_from = four_races, old_from

    @override
    def rows(self) -> list[Row]:
        rows: list[Row] = []
        races = RACES if self.four_races else {race: race for race in RACES}
        years = {age: int(cast(re.Match[str], re.search(r"\d+", age))[0]) for age in AGES}
        for name in ("train", "val"):
            for where, row in table(self.folder / f"fairface_label_{name}.csv", ("file", "age", "gender", "race")):
                old = allowed(where, "age", row["age"], years) >= self.old_from
                labels: dict[str, str | None] = {
                    "gender": allowed(where, "gender", row["gender"], GENDERS),
                    "race": allowed(where, "race", row["race"], races),
                    "age": "old" if old else "young",
                }
                held_out = hashed_split(row["file"]) == "validation"
                split = "test" if name == "val" else "validation" if held_out else "train"
                rows.append((split, self.folder / row["file"], labels))
        return rows


class CelebA(LabelledFaces):
    """CelebA: list_attr_celeba, list_eval_partition (.txt, or .csv as on Kaggle) and the folder img_align_celeba.

    Each may be in the folder itself or in the subfolder of the original archives: Anno/, Eval/, Img/.

    Args:
        folder: Folder of the data set.
        batch_size: Images per batch, on each GPU.
        workers: Processes that read images.
        attributes: For each head the attribute of CelebA, the name of the class with it and of the class without it.

    Example:
        >>> data = CelebA("celeba", attributes={"smile": ("Smiling", "smiling", "serious")})  # reads nothing
        >>> data.read()
        Traceback (most recent call last):
        ...
        ValueError: --data: there is no folder 'celeba'
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
    def rows(self) -> list[Row]:
        attributes = self.lines("list_attr_celeba", "Anno")
        where, header = next(attributes)
        if unknown := [name for name, *_ in self.attributes.values() if name not in header]:
            raise ValueError(f"--data: CelebA has no attribute {unknown[0]!r}, only {', '.join(header)}")
        columns = {head: header.index(name) for head, (name, *_) in self.attributes.items()}
        partition = self.lines("list_eval_partition", "Eval")
        splits = {
            file: allowed(where, "split", split, dict(zip("012", SPLITS, strict=True)))
            for where, (file, split) in partition
        }
        folder = self.there("img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba")
        rows: list[Row] = []
        for where, (file, *values) in attributes:
            if len(values) != len(header):
                raise ValueError(f"--data: {where}: its number of cells differs from the header's")
            labels: dict[str, str | None] = {
                head: yes if allowed(where, name, values[columns[head]], {"1": True, "-1": False, "0": False}) else no
                for head, (name, yes, no) in self.attributes.items()
            }
            rows.append((allowed(where, "file", file, splits), folder / file, labels))
        return rows

    def there(self, *paths: str) -> Path:
        """Return the first of some paths that exists.

        Raises:
            ValueError: If none exists.
        """
        existing = [path for path in paths if (self.folder / path).exists()]
        if not existing:
            raise ValueError(f"--data: {str(self.folder)!r} is not CelebA: it must contain {' or '.join(paths)}")
        return self.folder / existing[0]

    def lines(self, name: str, archive: str) -> Iterator[tuple[str, list[str]]]:
        """Yield file, line number and cells of each line of a text or CSV file, with the header of a list first."""
        file = self.there(f"{name}.txt", f"{name}.csv", f"{archive}/{name}.txt")
        is_csv = file.suffix == ".csv"
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            cells = line.split(",") if is_csv else line.split()
            heading = number == (1 if is_csv else 2) and name == "list_attr_celeba"
            if heading:
                yield f"{str(file)!r}, line {number}", cells[1:] if is_csv else cells
            elif cells and not (number == 1 and (is_csv or name == "list_attr_celeba")):
                yield f"{str(file)!r}, line {number}", cells


class UTKFace(LabelledFaces):
    """UTKFace: files, also in subfolders, whose names begin with age_gender_race_.

    A tenth each is held out for validation and test.

    Args:
        folder: Folder of the images.
        batch_size: Images per batch, on each GPU.
        workers: Processes that read images.
        old_from: The age in years from which a face counts as old.

    Example:
        >>> data = UTKFace("utkface", old_from=45)  # reads nothing
        >>> data.read()
        Traceback (most recent call last):
        ...
        ValueError: --data: there is no folder 'utkface'
    """

    def __init__(self, folder: str, batch_size: int = 64, workers: int = 4, old_from: int = 40) -> None:
        super().__init__(folder, batch_size, workers)
        self.old_from = old_from

    @override
    def rows(self) -> list[Row]:
        rows: list[Row] = []
        for file in sorted(self.folder.rglob("*.jpg")):
            parts = file.name.split("_")
            if len(parts) < 4 or not all(part.isdigit() for part in parts[:3]):
                continue  # a few files of the data set have no complete label
            age, gender, race = map(int, parts[:3])
            if gender > 1 or race > 4:
                continue
            labels: dict[str, str | None] = {
                "gender": UTK_GENDERS[gender],
                "race": UTK_RACES[race],
                "age": "old" if age >= self.old_from else "young",
            }
            rows.append((hashed_split(file.name), file, labels))
        if not rows:
            raise ValueError(
                f"--data: {str(self.folder)!r} contains no files such as 25_0_2_20170116174525125.jpg.chip.jpg"
            )
        return rows
