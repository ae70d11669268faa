"""The tables for spreadsheets: every image has its line, and no text is a formula."""

import csv
from pathlib import Path

import pytest
import torch
from fixed_counts import PROMPTS, fixed_results

from fairness_dft.metrics.image_readings import ImageReadings, Readings
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.csv_tables import image_table, safe_cell, write_per_prompt

CLASSES = {
    "training": {"gender": ("man", "woman")},
    "independent": {"gender": ("woman", "man"), "age": ("young", "old")},
}


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def readings(faces: list[bool], attributes: dict[str, list[int]], seeds: list[int], index: list[int]) -> Readings:
    """Return readings with a probability of 0.75 for each given class."""
    probabilities = {name: 0.25 + 0.5 * torch.eye(2)[classes] for name, classes in attributes.items()}
    boxes = torch.arange(4.0).expand(len(faces), 4) + 0.04
    return Readings(torch.tensor(index), torch.tensor(seeds), torch.tensor(faces), boxes, probabilities)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx"])
def test_no_text_is_a_formula(text: str) -> None:
    assert safe_cell(text) == f"'{text}"


@pytest.mark.parametrize("value", ["a chef", "", -0.5, None, 3, "a=b"])
def test_other_cells_stay_as_they_are(value: object) -> None:
    assert safe_cell(value) is value


def test_a_prompt_that_is_a_formula_is_quoted_in_both_tables(tmp_path: Path) -> None:
    prompts = [prompt._replace(text="=HYPERLINK(1)") if prompt is PROMPTS[0] else prompt for prompt in PROMPTS]
    write_per_prompt(tmp_path / "per_prompt.csv", fixed_results(), prompts)
    assert {row["prompt"] for row in read(tmp_path / "per_prompt.csv")} == {
        "'=HYPERLINK(1)", *(prompt.text for prompt in PROMPTS[1:])
    }  # fmt: skip
    one = {("training", "original"): readings([True], {"gender": [0]}, [7], [0])}
    image_table(prompts, one, {"training": CLASSES["training"]}, lambda *key: "-a.png").write(tmp_path / "i.csv")
    (row,) = read(tmp_path / "i.csv")
    assert row["prompt"] == "'=HYPERLINK(1)" and row["file"] == "'-a.png"


def test_rows_of_prompts_are_the_results(tmp_path: Path) -> None:
    results = fixed_results()
    write_per_prompt(tmp_path / "per_prompt.csv", results, PROMPTS)
    rows = read(tmp_path / "per_prompt.csv")
    assert len(rows) == 2 * 2 * 4 * (2 + 2 + 4)
    for row in rows:
        result = results.bias[row["classifier"]][row["attribute"]]
        side, index = result.models[row["model"]], [prompt.text for prompt in PROMPTS].index(row["prompt"])
        place = result.classes.index(row["class"])
        assert int(row["images"]) == side.counts[index][place] and int(row["no_face"]) == side.no_face[index]
        assert row["bias"] == ("" if side.per_prompt[index] is None else str(side.per_prompt[index]))
        assert float(row["target"]) == results.target_of(row["prompt"])[row["attribute"]][row["class"]]


def test_each_image_has_a_line_with_what_every_classifier_reads(tmp_path: Path) -> None:
    """The second image of the first prompt shows no face to the training classifier."""
    seen = {
        ("training", "original"): readings([True, False, True], {"gender": [1, 0, 0]}, [30, 10, 20], [0, 0, 1]),
        ("independent", "original"): readings(
            [True, True, True], {"gender": [1, 0, 0], "age": [0, 1, 1]}, [30, 10, 20], [0, 0, 1]
        ),
    }
    prompts = [Prompt("a chef", "chef", "work"), Prompt("a judge", "judge", "work")]
    table = image_table(prompts, seen, CLASSES, lambda model, index, seed: f"{model}/{index}/{seed}.png")
    table.write(tmp_path / "per_image.csv")
    rows = read(tmp_path / "per_image.csv")
    key = ("model", "prompt", "image", "seed", "file", "face")
    assert [[row[name] for name in key] for row in rows] == [
        ["original", "a chef", "1", "30", "original/0/30.png", "1"],
        ["original", "a chef", "2", "10", "original/0/10.png", "1"],
        ["original", "a judge", "1", "20", "original/1/20.png", "1"],
    ]
    assert [row["training.gender"] for row in rows] == ["woman", "", "man"]
    assert [row["training.gender_probability"] for row in rows] == ["0.75", "", "0.75"]
    assert [row["training.box_right"] for row in rows] == ["2.0", "", "2.0"]
    assert [row["independent.gender"] for row in rows] == ["man", "woman", "woman"]
    assert [row["independent.age"] for row in rows] == ["young", "old", "old"]
    lines = (tmp_path / "per_image.csv").read_text(encoding="utf-8").splitlines()
    for (model, prompt, image), line in table.lines.items():
        assert lines[line - 1].startswith(f"{model},{prompts[prompt].text},{image},")
    assert len(table.lines) == 3


def test_each_face_has_a_line_where_every_face_counts() -> None:
    """Classifiers may see different numbers of faces in an image."""
    seen = {
        ("training", "original"): readings([True, True, True], {"gender": [0, 1, 0]}, [5, 5, 6], [0, 0, 0]),
        ("independent", "original"): readings([True, True], {"gender": [0, 0], "age": [0, 0]}, [5, 6], [0, 0]),
    }
    table = image_table([Prompt("a chef", "chef", "work")], seen, CLASSES)
    column = {
        name: table.columns.index(name) for name in ("image", "face", "file", "training.gender", "independent.gender")
    }
    assert [[row[place] for place in column.values()] for row in table.rows] == [
        [1, 1, "", "man", "woman"],
        [1, 2, "", "woman", None],
        [2, 1, "", "man", "woman"],
    ]
    assert table.lines == {("original", 0, 1): 2, ("original", 0, 2): 4}


def test_readings_stand_by_prompt_in_the_order_of_the_images() -> None:
    """Ranks come one after the other; each has a part of every prompt."""
    metric = ImageReadings({"gender": 2, "age": 3})
    for index, seeds in ((0, [1, 2]), (1, [5]), (0, [3]), (1, [6])):  # two ranks
        count = len(seeds)
        probabilities = {"gender": torch.rand(count, 2), "age": torch.rand(count, 3)}
        face = torch.tensor([seed % 2 == 0 for seed in seeds])
        metric.update(index, torch.tensor(seeds), face, torch.rand(count, 4), probabilities)
    found = metric.readings()
    assert found.prompt.tolist() == [0, 0, 0, 1, 1] and found.seed.tolist() == [1, 2, 3, 5, 6]
    assert found.has_face.tolist() == [False, True, False, False, True]
    assert {name: table.shape for name, table in found.probabilities.items()} == {"gender": (5, 2), "age": (5, 3)}
    torch.testing.assert_close(found.probabilities["age"][3:], torch.cat([metric.numbers[1], metric.numbers[3]])[:, 6:])


def test_one_image_alone_is_read_too() -> None:
    metric = ImageReadings({"gender": 2})
    metric.update(0, torch.tensor([2**62 + 1]), torch.tensor([True]), torch.ones(1, 4), {"gender": torch.ones(1, 2)})
    found = metric.readings()
    assert found.seed.tolist() == [2**62 + 1] and found.boxes.shape == (1, 4)
