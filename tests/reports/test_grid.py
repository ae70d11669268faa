"""The picture's geometry, the results as JSON, and the table in the terminal."""

import io
import json
import math
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor
from printing import printed
from rich.console import Console
from scipy.stats import norm
from torch import Tensor

from fairness_dft import __version__
from fairness_dft.metrics.bias import summarize_bias
from fairness_dft.metrics.significance import permutation_test
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.grid import BAR, GAP, MARGIN, NO_FACE, PALETTE, TILE, GridRow, GridSide, comparison_grid
from fairness_dft.reports.results import VERSION, Measured, results, surroundings, write_json
from fairness_dft.reports.tables import print_results

PROMPTS = [Prompt(f"a {subject}", subject, "occupation") for subject in ("chef", "judge", "pilot", "nurse")]
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


def summaries(counts: list[list[int]], changed: list[list[int]]) -> dict:
    """By two judges for two attributes, before and after."""
    sides = {"original": counts, "ema": changed}
    return {
        (judge, attribute, model): summarize_bias(torch.tensor(side), torch.eye(1, len(side), dtype=int)[0], CLASSES)
        for judge in ("training", "independent")
        for attribute in ("gender", "age")
        for model, side in sides.items()
    }


def content(counts: list[list[int]], changed: list[list[int]], kept: float = 0.9) -> dict:
    measured = {("clip_t", "original"): 0.31, ("clip_t", "ema"): 0.3, ("dino", "ema"): kept}
    target = {"gender": {"man": 0.25, "woman": 0.75}}
    return results(
        ["gender"], target, PROMPTS[: len(counts)], Measured(summaries(counts, changed), measured), {"steps": 3}
    )


def strictly(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_results_survive_the_way_to_the_file_and_back(tmp_path: Path) -> None:
    found = content([[9, 0], [6, 4]], [[4, 5], [5, 5]])
    file = tmp_path / "new" / "folder" / "results.json"
    write_json(file, found)
    assert strictly(file.read_text(encoding="utf-8")) == found
    for judge in ("training", "independent"):
        for attribute in ("gender", "age"):
            models = found["bias"][judge][attribute]
            assert models["original"]["bias"] == pytest.approx((1 + 0.2) / 2)
            assert models["ema"]["bias"] == pytest.approx((1 / 9 + 0) / 2)
            assert models["drift"] == pytest.approx(15 / 19 - 9 / 19)
            assert models["original"]["no_face_share"] == 1
            assert models["ema"]["gap"] == pytest.approx(0) and models["original"]["gap"] > 0.5
            target = None if attribute == "age" else [0.25, 0.75]  # where shares are unequal, the distance is tested
            assert models["p_value"] == permutation_test([[9, 0], [6, 4]], [[4, 5], [5, 5]], target)
            assert models["measure"] == ("bias" if attribute == "age" else "distance")
            assert models["original"]["above_floor"] == models["original"]["bias"] - models["original"]["floor"]
            distance = models["ema"].get("distance", {}).get("total_variation")
            assert distance == (pytest.approx(9 / 19 - 0.25) if attribute == "gender" else None)
    assert found["kept"] == {"clip_t": {"original": 0.31, "ema": 0.3}, "dino": {"ema": 0.9}}
    assert found["attributes"] == ["gender"] and found["version"] == VERSION
    assert found["run"] == {"steps": 3, "test_prompts": ["a chef", "a judge"], "paired": False}


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch) -> None:
    def version(name: str) -> str:
        if name == "fairness_dft":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("fairness_dft.reports.results.version", version)
    assert surroundings()["versions"]["fairness_dft"] == __version__


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


def test_concepts_have_their_own_figures(tmp_path: Path) -> None:
    before, after = [[9, 0], [6, 4], [0, 8], [8, 0]], [[4, 5], [5, 5], [4, 4], [4, 4]]
    target = {"gender": {"man": 0.5, "woman": 0.5}}
    sports = [prompt._replace(concept="sport") for prompt in PROMPTS[2:]]
    found = results(["gender"], target, [*PROMPTS[:2], *sports], Measured(summaries(before, after)), {})
    file = tmp_path / "results.json"
    write_json(file, found)
    assert strictly(file.read_text(encoding="utf-8")) == found
    gender = {concept: judges["independent"]["gender"] for concept, judges in found["concepts"].items()}
    assert gender["occupation"]["original"]["bias"] == pytest.approx((1 + 0.2) / 2)
    assert gender["sport"]["original"]["bias"] == 1 and gender["sport"]["ema"]["bias"] == 0
    stream = io.StringIO()
    print_results(found, Console(file=stream, width=200))
    lines = stream.getvalue().split("Bias by concept")[1].split("Frequencies")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert [row[:5] for row in rows] == [
        [concept, "gender", judge, before, after]
        for concept, before, after in (("occupation", "0.60±0.40", "0.06±0.06"), ("sport", "1.00±0.00", "0.00±0.00"))
        for judge in ("training", "independent")
    ]
    assert "Bias by concept" not in printed(content([[9, 0], [6, 4]], [[4, 5], [5, 5]]))


def test_obedience_is_a_table_of_its_own() -> None:
    names = {"a chef": "old", "a judge": "young", "a pilot": None}
    prompts = [prompt._replace(names=(("age", names[prompt.text]),)) for prompt in PROMPTS[:3]]
    sides = {"original": [[6, 14], [18, 2], [0, 9]], "ema": [[10, 10], [15, 5], [9, 0]]}
    measured = {
        ("training", name, model): summarize_bias(torch.tensor(counts), torch.zeros(3, dtype=int), classes)
        for name, classes in (("gender", CLASSES), ("age", ("young", "old")))
        for model, counts in sides.items()
    }
    found = results(["gender"], {"gender": {"man": 0.5, "woman": 0.5}}, prompts, Measured(measured), {})
    assert found["prompt_adherence"].keys() == {"training"} and found["prompt_adherence"]["training"].keys() == {"age"}
    z = norm.ppf(0.975)
    for model, shown in (("original", {"old": 14, "young": 18}), ("ema", {"old": 10, "young": 15})):
        side = found["prompt_adherence"]["training"]["age"][model]
        for of, k, n in (
            (side, sum(shown.values()), 40),
            *((side["classes"][kind], k, 20) for kind, k in shown.items()),
        ):
            middle = (k + z**2 / 2) / (n + z**2)  # Wilson's interval
            half = z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
            assert (of["share"], of["images"]) == (k / n, n)
            assert (of["low"], of["high"]) == (pytest.approx(middle - half), pytest.approx(middle + half))
    lines = printed(found).split("show what their prompt names")[1].split("What was kept")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert rows == [
        ["age", "training", "0.800", "0.625", "40"],
        ["old", "training", "0.700", "0.500", "20"],
        ["young", "training", "0.900", "0.750", "20"],
    ]
    assert "show what their prompt names" not in printed(content([[9, 0], [6, 4]], [[4, 5], [5, 5]]))


def test_what_is_not_known_is_null(tmp_path: Path) -> None:
    found = content([[0, 0], [0, 0]], [[4, 5], [5, 5]], kept=math.nan)
    file = tmp_path / "results.json"
    write_json(file, found)
    read = strictly(file.read_text(encoding="utf-8"))
    models = read["bias"]["training"]["gender"]
    assert models["original"]["bias"] is None and models["original"]["frequencies"] == [None, None]
    assert models["drift"] is None and read["kept"]["dino"]["ema"] is None
    print_results(read, Console(file=io.StringIO(), width=200))


def test_without_a_model_to_compare_there_is_no_drift() -> None:
    only = {key: summary for key, summary in summaries([[1, 2], [2, 1]], [[1, 1], [1, 1]]).items() if key[2] == "ema"}
    assert "drift" not in results(["gender"], {}, PROMPTS[:2], Measured(only), {})["bias"]["training"]["gender"]


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(file, {"a": object()})

    def half(path: Path, text: str, **options: str) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        write_json(file, {"a": 2})
    assert json.loads(file.read_bytes()) == {"a": 1}


def test_the_table_names_every_judge_and_attribute() -> None:
    stream = io.StringIO()
    print_results(content([[9, 0], [6, 4]], [[4, 5], [5, 5]]), Console(file=stream, width=200))
    lines = stream.getvalue().splitlines()
    assert any("aligned: gender" in line for line in lines)
    frequencies = [line.split("│")[1:-1] for line in lines if "man " in line and "training" in line]
    frequencies = [[cell.strip() for cell in row] for row in frequencies]
    assert frequencies == [
        ["gender", "man", "training", "0.25", "0.79", "0.47"],
        ["gender", "woman", "training", "0.75", "0.21", "0.53"],
    ]
    for judge in ("training", "independent"):
        for attribute in ("gender", "age"):
            (line,) = [line for line in lines if f" {attribute} " in line and f" {judge} " in line and "±" in line]
            assert "0.60±0.40" in line and "0.06±0.06" in line and "0.32" in line
    (line,) = [line for line in lines if "clip_t" in line]
    assert "0.310" in line and "0.300" in line
    (line,) = [line for line in lines if "dino" in line]
    assert "–" in line and "0.900" in line
    (line,) = [line for line in lines if "without a face" in line]
    assert line.count("0.050") == 2


def test_a_judge_with_its_classes_in_another_order_is_read_by_name() -> None:
    stream, found = io.StringIO(), content([[9, 0], [6, 4]], [[4, 5], [5, 5]])
    for model in ("original", "ema"):
        gender = found["bias"]["independent"]["gender"][model]
        gender["classes"], gender["frequencies"] = gender["classes"][::-1], gender["frequencies"][::-1]
    print_results(found, Console(file=stream, width=200))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in stream.getvalue().splitlines()]
    figures = {(row[1], row[2]): row[3:] for row in rows if len(row) == 6 and row[0] == "gender"}
    assert figures["man", "training"] == figures["man", "independent"] == ["0.25", "0.79", "0.47"]
    assert figures["woman", "training"] == figures["woman", "independent"] == ["0.75", "0.21", "0.53"]


def test_the_tables_fit_a_terminal_of_eighty_columns() -> None:
    names = {"gender": CLASSES, "race": CLASSES, "age": CLASSES, "gender×race": CLASSES, "gender×race×age": CLASSES}
    measured = {
        (judge, name, model): summarize_bias(torch.tensor([[30, 18], [2, 46]]), torch.tensor([1, 0]), classes)
        for judge in ("training", "independent")
        for name, classes in names.items()
        for model in ("original", "ema")
    }
    target = {name: {"man": 0.5, "woman": 0.5} for name in names}
    measured = Measured(measured, {("clip_t", "ema"): 0.3})
    found = results(["gender", "race", "age"], target, PROMPTS[:2], measured, {"steps": 3})
    stream = io.StringIO()
    print_results(found, Console(file=stream, width=80))
    assert "…" not in stream.getvalue() and "drift" in stream.getvalue()
    assert max(map(len, stream.getvalue().splitlines())) <= 80
