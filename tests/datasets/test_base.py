"""Data sets of labeled faces, in miniature copies of their layouts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fairness_dft.datasets.base import UNKNOWN, LabelledFaces, LabelledFolder, Pictures, hashed_split
from fairness_dft.datasets.faces import CelebA, FairFace, UTKFace


def picture(file: Path, size: tuple[int, int] = (20, 20)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(file)


def labels(data: LabelledFaces, name: str) -> tuple[str, dict[str, str]]:
    """The split of a file, and its labels by name."""
    data.read()
    for split, pictures in data.pictures.items():
        for entry in pictures:
            if entry.file.name == name:
                return split, {head: data.heads[head][i] for head, i in entry.labels.items() if i != UNKNOWN}
    raise KeyError(name)


@pytest.fixture
def fairface(tmp_path: Path) -> Path:
    races = ["White", "Black", "East Asian", "Southeast Asian", "Indian", "Middle Eastern", "Latino_Hispanic"]
    ages = ["0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70"]
    for split, count in (("train", 63), ("val", 9)):
        lines = ["file,age,gender,race,service_test"]
        for i in range(count):
            lines.append(f"{split}/{i}.jpg,{ages[i % 9]},{('Male', 'Female')[i % 2]},{races[i % 7]},True")
            picture(tmp_path / split / f"{i}.jpg")
        (tmp_path / f"fairface_label_{split}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_fairface(fairface: Path) -> None:
    data = FairFace(str(fairface))
    data.read()
    assert data.heads == {
        "gender": ("man", "woman"), "race": ("Asian", "Black", "Indian", "WMELH"), "age": ("old", "young")
    }  # fmt: skip
    assert len(data.pictures["train"]) + len(data.pictures["validation"]) == 63 and len(data.pictures["test"]) == 9
    assert 0 < len(data.pictures["validation"]) < 20
    expected = {
        "0.jpg": ("man", "WMELH", "young"), "1.jpg": ("woman", "Black", "young"), "2.jpg": ("man", "Asian", "young"),
        "5.jpg": ("woman", "WMELH", "old"), "8.jpg": ("man", "Black", "old"), "4.jpg": ("man", "Indian", "young"),
    }  # fmt: skip
    for entry in data.pictures["test"]:
        if entry.file.name in expected:
            found = tuple(data.heads[head][i] for head, i in entry.labels.items())
            assert found == expected[entry.file.name], entry.file.name
    seven = FairFace(str(fairface), four_races=False, old_from=50)
    seven.read()
    assert len(seven.heads["race"]) == 7
    assert sum(seven.heads["age"][p.labels["age"]] == "old" for p in seven.pictures["test"]) == 3


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    rows = [("000001.jpg", 1, -1, 1), ("000002.jpg", -1, 1, -1), ("000003.jpg", -1, 1, 1), ("000004.jpg", 1, 1, -1)]
    lines = ["4", "Male Smiling Young", *(" ".join(map(str, row)) for row in rows)]
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 0\n000003.jpg 1\n000004.jpg 2\n")
    for name, *_ in rows:
        picture(tmp_path / "img_align_celeba" / name, (18, 22))
    return tmp_path


def test_celeba(celeba: Path) -> None:
    data = CelebA(str(celeba))
    assert labels(data, "000001.jpg") == ("train", {"gender": "man", "age": "young"})
    assert labels(data, "000002.jpg") == ("train", {"gender": "woman", "age": "old"})
    assert labels(data, "000003.jpg") == ("validation", {"gender": "woman", "age": "young"})
    assert labels(data, "000004.jpg")[0] == "test"
    smiling = CelebA(str(celeba), attributes={"smile": ("Smiling", "smiling", "serious")})
    assert labels(smiling, "000001.jpg") == ("train", {"smile": "serious"})
    with pytest.raises(ValueError, match="CelebA has no attribute 'Bald', only Male, Smiling, Young"):
        CelebA(str(celeba), attributes={"hair": ("Bald", "bald", "hair")}).read()


@pytest.mark.parametrize("layout", ["archives", "kaggle"])
def test_celeba_where_others_have_it(celeba: Path, tmp_path_factory: pytest.TempPathFactory, layout: str) -> None:
    other = tmp_path_factory.mktemp("celeba")
    attributes = (celeba / "list_attr_celeba.txt").read_text()
    partition = (celeba / "list_eval_partition.txt").read_text()
    if layout == "archives":
        for folder in ("Anno", "Eval", "Img"):
            (other / folder).mkdir()
        (other / "Anno" / "list_attr_celeba.txt").write_text(attributes)
        (other / "Eval" / "list_eval_partition.txt").write_text(partition)
        shutil.copytree(celeba / "img_align_celeba", other / "Img" / "img_align_celeba")
    else:
        _, header, *rows = attributes.splitlines()
        table = [",".join(["image_id", *header.split()]), *(",".join(row.split()) for row in rows)]
        (other / "list_attr_celeba.csv").write_text("\n".join(table) + "\n")
        splits = ["image_id,partition", *(row.replace(" ", ",") for row in partition.splitlines())]
        (other / "list_eval_partition.csv").write_text("\n".join(splits) + "\n")
        shutil.copytree(celeba / "img_align_celeba", other / "img_align_celeba" / "img_align_celeba")
    here, there = CelebA(str(celeba)), CelebA(str(other))
    here.read()
    there.read()
    assert there.heads == here.heads
    for split, pictures in here.pictures.items():
        assert [(p.file.name, p.labels) for p in there.pictures[split]] == [(p.file.name, p.labels) for p in pictures]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("list_attr_celeba.txt", "000002.jpg -1", "000002.jpg x", "line 4: Male must be one of 1, -1, 0, but got 'x'"),
        ("list_attr_celeba.txt", "000002.jpg -1 1 -1", "000002.jpg -1 1", "line 4: its number of cells differs"),
        ("list_attr_celeba.txt", "000002.jpg", "000009.jpg", "line 4: file must be one of"),
        (
            "list_eval_partition.txt",
            "000003.jpg 1",
            "000003.jpg 7",
            "line 3: split must be one of 0, 1, 2, but got '7'",
        ),
        (
            "fairface_label_train.csv",
            "1.jpg,3-9,Female",
            "1.jpg,3-9,female",
            "gender must be one of Male, Female, but got",
        ),
        ("fairface_label_train.csv", "1.jpg,3-9", "1.jpg,03-Sep", "age must be one of 0-2, 3-9"),
        ("fairface_label_train.csv", "Black", "Blue", "race must be one of White"),
    ],
)
def test_cells_that_mean_nothing_are_named(
    celeba: Path, fairface: Path, file: str, old: str, new: str, message: str
) -> None:
    text = (celeba / file).read_text()
    assert old in text
    (celeba / file).write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        (FairFace if "fairface" in file else CelebA)(str(celeba)).read()
    assert "\n" not in str(error.value)


def test_utkface(tmp_path: Path) -> None:
    names = [f"{age}_{age % 2}_{age % 5}_20170109{age:04}.jpg.chip.jpg" for age in range(1, 100)]
    for name in [*names, "61_1_20170109142408075.jpg.chip.jpg", "30_3_1_2017.jpg"]:  # two with wrong labels
        picture(tmp_path / name)
    data = UTKFace(str(tmp_path), old_from=45)
    data.read()
    assert sum(map(len, data.pictures.values())) == 99
    assert labels(data, names[43])[1] == {"gender": "man", "race": "Others", "age": "young"}
    assert labels(data, names[44])[1] == {"gender": "woman", "race": "White", "age": "old"}
    again = UTKFace(str(tmp_path))
    again.read()
    for split in data.pictures:
        assert [p.file for p in again.pictures[split]] == [p.file for p in data.pictures[split]]


def test_hashed_splits_hold_out_a_tenth_each() -> None:
    found = [hashed_split(f"{i}.jpg") for i in range(5000)]
    assert {split: found.count(split) / 5000 for split in ("validation", "test")} == pytest.approx(
        {"validation": 0.1, "test": 0.1}, abs=0.015
    )


def folder(path: Path, text: str) -> LabelledFolder:
    (path / "labels.csv").write_text(text, encoding="utf-8")
    for i in range(4):
        picture(path / f"{i}.png", (30, 20))
    return LabelledFolder(str(path), batch_size=2, workers=0)


def test_folder_with_a_table(tmp_path: Path) -> None:
    text = "file,split,glasses,gender\n0.png,train,no,a\n1.png,train,yes,b\n2.png,validation,,b\n3.png,test,no,\n"
    data = folder(tmp_path, text)
    assert labels(data, "0.png") == ("train", {"glasses": "no", "gender": "a"})
    assert labels(data, "2.png") == ("validation", {"gender": "b"})
    data.size = 8
    pictures, truth = next(iter(data.val_dataloader()))
    assert pictures.shape == (1, 3, 8, 8) and pictures.dtype == torch.uint8
    assert truth["glasses"].tolist() == [UNKNOWN] and truth["gender"].tolist() == [1]
    ordered = LabelledFolder(str(tmp_path), classes={"glasses": ["yes", "no"]})
    ordered.read()
    assert ordered.heads["glasses"] == ("yes", "no") and ordered.heads["gender"] == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,gender\n0.png,a\n", "lacks the column 'file'"),
        ("file,split,gender\n0.png,dev,a\n", r"line 2: split must be one of train, validation, test, but got 'dev'"),
        (
            "file,split,gender\n0.png,train,a\n1.png,train,a\n2.png,validation,a\n",
            "gender must have two classes or more",
        ),
        ("file,split,gender\n0.png,train,a\n1.png,train,b\n", "has no images for the split validation"),
        (
            "file,split,gender\n9.png,train,a\n1.png,validation,b\n",
            "1 of 2 images that the labels name do not exist, such as .*9.png",
        ),
        ("file,split\n0.png,train\n1.png,validation\n", "has no labels: add one column for each head"),
        ("file,split,gender\n0.png,train\n", "line 2: its number of cells differs from"),
        ("file,split,gender\n0.png,train,a,b\n", "line 2: its number of cells differs from"),
        ("file,gender,split\n0.png,a\n", "line 2: its number of cells differs from"),
        ("file,gender,gender\n0.png,a,b\n", "two columns of the same name"),
        ("", "lacks the column 'file'; it has none"),
        ("file,split,gender\n,train,a\n", "line 2: file must be given, and in one split, but got ''"),
        ("file,split,gender\n0.png,train,a\n0.png,test,a\n", "line 3: file must be given, and in one split"),
        (
            "file,split,skin/tone\n0.png,train,a\n1.png,validation,b\n",
            "the name of a head must not be empty or contain /",
        ),
        ("file,split,gender\n0.png,train,a\n1.png,validation,b\n", "the split train has no image of gender 'b'"),
    ],
)
def test_bad_tables_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        folder(tmp_path, text).read()
    assert "\n" not in str(error.value)


def test_heads_are_in_the_order_of_the_columns_whatever_the_first_row_knows(tmp_path: Path) -> None:
    rows = ["file,split,gender,face", "0.png,train,,absent", "1.png,train,man,present", "2.png,train,woman,present"]
    rows += ["3.png,validation,man,present"]
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    data = LabelledFolder(str(tmp_path))
    data.read()
    assert list(data.heads.items()) == [("gender", ("man", "woman")), ("face", ("absent", "present"))]
    assert data.pictures["train"][0].labels == {"gender": UNKNOWN, "face": 0}


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    for data, message in (
        (FairFace(str(tmp_path / "missing")), "there is no folder"),
        (FairFace(str(tmp_path)), "there is no file .*fairface_label_train.csv"),
        (CelebA(str(tmp_path)), "is not CelebA: it must contain list_attr_celeba.txt or"),
        (UTKFace(str(tmp_path)), "contains no files such as 25_0_2"),
        (LabelledFolder(str(tmp_path)), "there is no file .*labels.csv"),
    ):
        with pytest.raises(ValueError, match=message):
            data.read()
    (tmp_path / "labels.csv").write_bytes(b"file,gender\n\xff\xfe,a\n")
    with pytest.raises(ValueError, match="is not a CSV file in UTF-8"):
        LabelledFolder(str(tmp_path)).read()
    for name in ("0.png", "1.png"):
        picture(tmp_path / name)
    (tmp_path / "labels.csv").write_text("file,split,gender\n0.png,train,a\n1.png,validation,b\n")
    with pytest.raises(ValueError, match="`classes` of gender must be"):
        LabelledFolder(str(tmp_path), classes={"gender": ["a", "c"]}).read()
    with pytest.raises(ValueError, match="`old_from` must be a multiple of 10"):
        FairFace(str(tmp_path), old_from=45)
    with pytest.raises(ValueError, match="`batch_size` must be positive"):
        UTKFace(str(tmp_path), batch_size=0)


def test_pictures_are_cropped_about_their_middle_and_scaled(tmp_path: Path) -> None:
    stripes = np.zeros((20, 40, 3), np.uint8)
    stripes[:, 10:30] = 255  # what a square crop keeps
    Image.fromarray(stripes).save(tmp_path / "0.png")
    Image.fromarray(stripes).save(tmp_path / "1.png")
    Image.fromarray(stripes).save(tmp_path / "2.png")
    (tmp_path / "labels.csv").write_text("file,split,a\n0.png,train,x\n1.png,train,y\n2.png,validation,y\n")
    data = LabelledFolder(str(tmp_path))
    data.read()
    pixels, truth = Pictures(data.pictures["train"], 10)[0]
    assert pixels.shape == (3, 10, 10) and pixels.min() == 255 and truth == {"a": 0}
