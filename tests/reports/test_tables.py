"""The tables in the terminal: what they say, and that they fit."""

import math
from dataclasses import replace

import pytest
import torch
from printing import printed
from scipy.stats import norm

from fairness_dft.metrics.bias import summarize_bias
from fairness_dft.metrics.significance import permutation_test
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.build import Measured, build_results
from fairness_dft.reports.results import Results

PROMPTS = [Prompt(f"a {subject}", subject, "occupation") for subject in ("chef", "judge", "pilot", "nurse")]
CLASSES = ("man", "woman")
BEFORE, AFTER = [[9, 0], [6, 4]], [[4, 5], [5, 5]]
CLASSIFIERS = ("training", "independent")


def summaries(counts: list[list[int]], changed: list[list[int]] | None) -> dict:
    """Return summaries by two classifiers for two attributes; one image of the first prompt shows no face."""
    return {
        (classifier, attribute, model): summarize_bias(
            torch.tensor(side), torch.eye(1, len(side), dtype=int)[0], CLASSES
        )
        for classifier in CLASSIFIERS
        for attribute in ("gender", "age")
        for model, side in (("original", counts), ("ema", changed))
        if side is not None
    }


def content(counts: list[list[int]] = BEFORE, changed: list[list[int]] | None = AFTER, kept: float = 0.9) -> Results:
    measured = {("clip_t", "original"): 0.31}
    measured |= {("clip_t", "ema"): 0.3, ("dino", "ema"): kept} if changed else {}
    target = {"gender": {"man": 0.25, "woman": 0.75}}
    return build_results(["gender"], target, PROMPTS[: len(counts)], Measured(summaries(counts, changed), measured))


def rows(table: str) -> list[list[str]]:
    """Return the cells of a printed table, without its header."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]


def test_figures_by_hand() -> None:
    results = content()
    for classifier in CLASSIFIERS:
        for attribute in ("gender", "age"):
            result = results.bias[classifier][attribute]
            before, after = result.original, result.ema
            assert before.bias == pytest.approx((1 + 0.2) / 2) and after.bias == pytest.approx((1 / 9 + 0) / 2)
            assert result.drift == pytest.approx(15 / 19 - 9 / 19)
            assert before.no_face_images == 1 and before.no_face_share == 1 / 20
            assert after.unbiased_rms_gap == pytest.approx(0) and before.unbiased_rms_gap > 0.5
            target = None if attribute == "age" else [0.25, 0.75]  # where shares are unequal, the distance is tested
            assert result.p_value == permutation_test(BEFORE, AFTER, target)
            assert result.measure == ("bias" if attribute == "age" else "distance")
            assert before.above_floor == before.bias - before.floor
            distance = after.distance and after.distance.total_variation
            assert distance == (pytest.approx(9 / 19 - 0.25) if attribute == "gender" else None)


def test_the_table_names_every_classifier_and_attribute() -> None:
    lines = printed(content()).splitlines()
    assert any("aligned: gender" in line for line in lines)
    frequencies = [row for row in rows("\n".join(lines)) if row[1] in CLASSES and row[2] == "training"]
    assert frequencies == [
        ["gender", "man", "training", "0.25", "0.79", "0.47"],
        ["gender", "woman", "training", "0.75", "0.21", "0.53"],
    ]
    for classifier in CLASSIFIERS:
        for attribute in ("gender", "age"):
            (line,) = [line for line in lines if f" {attribute} " in line and f" {classifier} " in line and "±" in line]
            last = content().bias[classifier][attribute].ema
            cells = ["0.60±0.40", "0.06±0.06", f"{last.low:.2f}–{last.high:.2f}", f"{last.floor:.2f}", "1.00"]
            assert rows(line) == [[attribute, classifier, *cells]]
    assert ["clip_t", "0.310", "0.300"] in rows("\n".join(lines))
    assert ["dino", "–", "0.900"] in rows("\n".join(lines))
    assert ["images that show no face", "0.050", "0.050"] in rows("\n".join(lines))


def test_one_model_alone_is_neither_before_nor_after() -> None:
    """Without a finetuned model there is nothing that finetuning keeps, and no classifier of the training."""
    shown = printed(content(changed=None))
    assert "base model" not in shown and "finetun" not in shown and "training" not in shown
    last = content(changed=None).bias["training"]["age"].original
    reading = [f"{last.low:.2f}–{last.high:.2f}", f"{last.floor:.2f}", "1.00"]
    assert ["age", "first", "0.60±0.40", *reading] in rows(shown)
    assert ["gender", "man", "independent", "0.25", "0.79"] in rows(shown)
    assert ["clip_t", "0.310"] in rows(shown)


def test_concepts_have_their_own_figures() -> None:
    before, after = [[9, 0], [6, 4], [0, 8], [8, 0]], [[4, 5], [5, 5], [4, 4], [4, 4]]
    target = {"gender": {"man": 0.5, "woman": 0.5}}
    sports = [prompt._replace(concept="sport") for prompt in PROMPTS[2:]]
    results = build_results(["gender"], target, [*PROMPTS[:2], *sports], Measured(summaries(before, after)))
    gender = {concept: seen["independent"]["gender"] for concept, seen in results.concepts.items()}
    assert gender["occupation"].original.bias == pytest.approx((1 + 0.2) / 2)
    assert gender["sport"].original.bias == 1 and gender["sport"].ema.bias == 0
    table = printed(results).split("Bias by concept")[1].split("Class frequencies")[0]
    assert [row[:5] for row in rows(table)] == [
        [concept, "gender", classifier, before, after]
        for concept, before, after in (("occupation", "0.60±0.40", "0.06±0.06"), ("sport", "1.00±0.00", "0.00±0.00"))
        for classifier in CLASSIFIERS
    ]
    assert "Bias by concept" not in printed(content())


def test_prompt_adherence_is_a_table_of_its_own() -> None:
    names = {"a chef": "old", "a judge": "young", "a pilot": None}
    prompts = [prompt._replace(names=(("age", names[prompt.text]),)) for prompt in PROMPTS[:3]]
    sides = {"original": [[6, 14], [18, 2], [0, 9]], "ema": [[10, 10], [15, 5], [9, 0]]}
    measured = {
        ("training", name, model): summarize_bias(torch.tensor(counts), torch.zeros(3, dtype=int), classes)
        for name, classes in (("gender", CLASSES), ("age", ("young", "old")))
        for model, counts in sides.items()
    }
    results = build_results(["gender"], {"gender": {"man": 0.5, "woman": 0.5}}, prompts, Measured(measured))
    adherence = results.prompt_adherence
    assert adherence.keys() == {"training"} and adherence["training"].keys() == {"age"}
    z = norm.ppf(0.975)
    for model, shown in (("original", {"old": 14, "young": 18}), ("ema", {"old": 10, "young": 15})):
        side = adherence["training"]["age"][model]
        for part, k, n in (
            (side, sum(shown.values()), 40),
            *((side.classes[label], k, 20) for label, k in shown.items()),
        ):
            middle = (k + z**2 / 2) / (n + z**2)  # Wilson's interval
            half = z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
            assert (part.share, part.images) == (k / n, n)
            assert (part.low, part.high) == (pytest.approx(middle - half), pytest.approx(middle + half))
    table = printed(results).split("show what their prompt names")[1].split("What finetuning keeps")[0]
    assert rows(table) == [
        ["age", "training", "0.800", "0.625", "40"],
        ["old", "training", "0.700", "0.500", "20"],
        ["young", "training", "0.900", "0.750", "20"],
    ]
    assert "show what their prompt names" not in printed(content())


def test_what_is_not_known_is_a_dash() -> None:
    results = content([[0, 0], [0, 0]], kept=math.nan)
    gender = results.bias["training"]["gender"]
    assert gender.original.bias is None and gender.original.frequencies == (None, None)
    assert gender.drift is None and results.kept["dino"] == {"ema": None}
    assert ["gender", "man", "training", "0.25", "–", "0.47"] in rows(printed(results))
    assert ["dino", "–", "–"] in rows(printed(results))


def test_classes_in_another_order_are_read_by_name() -> None:
    results = content()
    gender = results.bias["independent"]["gender"]
    turned = {model: replace(side, frequencies=side.frequencies[::-1]) for model, side in gender.models.items()}
    results.bias["independent"]["gender"] = replace(gender, classes=gender.classes[::-1], **turned)
    figures = {(row[1], row[2]): row[3:] for row in rows(printed(results)) if len(row) == 6 and row[0] == "gender"}
    assert figures["man", "training"] == figures["man", "independent"] == ["0.25", "0.79", "0.47"]
    assert figures["woman", "training"] == figures["woman", "independent"] == ["0.75", "0.21", "0.53"]


def test_the_tables_fit_a_terminal_of_eighty_columns() -> None:
    names = {"gender": CLASSES, "race": CLASSES, "age": CLASSES, "gender×race": CLASSES, "gender×race×age": CLASSES}
    counted = {
        (classifier, name, model): summarize_bias(torch.tensor([[30, 18], [2, 46]]), torch.tensor([1, 0]), classes)
        for classifier in CLASSIFIERS
        for name, classes in names.items()
        for model in ("original", "ema")
    }
    target = {name: {"man": 0.5, "woman": 0.5} for name in names}
    measured = Measured(counted, {("clip_t", "ema"): 0.3})
    shown = printed(build_results(["gender", "race", "age"], target, PROMPTS[:2], measured), width=80)
    assert "…" not in shown and "max." in shown
    assert max(map(len, shown.splitlines())) <= 80
