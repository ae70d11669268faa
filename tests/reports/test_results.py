"""What a test's figures are made of: targets, prompts that name attributes, and what only one judge sees."""

import pytest
import torch
from printing import printed

from fairness_dft.metrics.bias import summarize_bias
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.results import Measured, results

CLASSES = ("man", "woman")
PROMPTS = [Prompt(f"a {subject}", subject, "occupation") for subject in ("chef", "judge")]


def seen_by(**judges: dict[str, list[list[int]]]) -> dict:
    """Summaries of gender by each judge, of tables of counts by model."""
    return {
        (judge, "gender", model): summarize_bias(torch.tensor(counts), torch.zeros(len(counts), dtype=int), CLASSES)
        for judge, of in judges.items()
        for model, counts in of.items()
    }


EVEN = {"gender": {"man": 0.5, "woman": 0.5}}


def test_what_only_the_training_classifier_sees() -> None:
    sides = {"original": [[10, 0], [0, 10]], "ema": [[5, 5], [5, 5]]}
    fooled = {"original": [[10, 0], [0, 10]], "ema": [[9, 1], [2, 8]]}
    agreement = {("training", "independent", "gender", "ema"): 0.7}
    measured = Measured(seen_by(training=sides, independent=fooled, same=sides), agreement=agreement)
    found = results(["gender"], EVEN, PROMPTS, measured, {})
    assert found["agreement"] == {"training": {"independent": {"gender": {"ema": 0.7}}}}
    assert results(["age"], {"age": {}}, PROMPTS, measured, {})["classifier_overfit"] == {}  # gender was not aligned
    assert found["classifier_overfit"] == {"independent": {"gender": pytest.approx(0.7)}, "same": {"gender": 0}}
    alone = seen_by(training={"original": [[1, 2], [2, 1]]}, other={"original": [[1, 2], [2, 1]]})
    assert results(["gender"], EVEN, PROMPTS, Measured(alone), {})["classifier_overfit"] == {}


def test_of_an_improvement_that_may_be_chance_no_share_is_told() -> None:
    for before, after in (([[5, 5], [5, 5]], [[5, 5], [5, 5]]), ([[6, 4], [5, 5]], [[5, 5], [5, 5]])):
        sides = {"original": before, "ema": after}
        measured = Measured(seen_by(training=sides, independent=sides))
        assert results(["gender"], EVEN, PROMPTS, measured, {})["classifier_overfit"]["independent"] == {"gender": None}


def test_unequal_targets_are_measured_by_their_distance() -> None:
    """From even to three women of four: the bias rises, and that is what was wanted."""
    sides = {"original": [[20, 20], [20, 20]], "ema": [[10, 30], [10, 30]]}
    fooled = {"original": [[20, 20], [20, 20]], "ema": [[15, 25], [15, 25]]}
    target = {"gender": {"man": 0.25, "woman": 0.75}}
    found = results(["gender"], target, PROMPTS, Measured(seen_by(training=sides, independent=fooled)), {})
    models = found["bias"]["training"]["gender"]
    assert models["ema"]["bias"] > models["original"]["bias"]
    assert [models[side]["distance"]["total_variation_by_prompt"] for side in ("original", "ema")] == [0.25, 0]
    assert models["p_value"] < 0.05
    assert found["classifier_overfit"] == {"independent": {"gender": pytest.approx(0.5)}}
    shown = printed(found).split("Distance of a prompt from its target")[1]
    cells = [line.split("│")[1:-1] for line in shown.splitlines() if "│" in line and "training" in line]
    assert [cell.strip() for cell in cells[0]][:4] == ["gender", "training", "0.25", "0.00"]


def test_each_prompt_is_compared_with_its_own_target() -> None:
    sides = {"original": [[9, 1], [9, 1]], "ema": [[9, 1], [5, 5]]}
    own = {"a chef": {"gender": {"man": 0.9, "woman": 0.1}}}
    found = results(["gender"], EVEN, PROMPTS, Measured(seen_by(training=sides)), {}, own)
    models = found["bias"]["training"]["gender"]
    assert models["original"]["distance"]["per_prompt"] == pytest.approx([0, 0.4])
    assert models["ema"]["distance"]["per_prompt"] == pytest.approx([0, 0])
    assert models["ema"]["distance"]["total_variation"] == pytest.approx(0)  # of 14 men among 20, who are wanted
    assert models["measure"] == "distance" and found["own_targets"] == own
    assert "prompts with targets of their own: 1" in printed(found)


def test_a_prompt_that_names_an_attribute_counts_in_no_mean_of_it() -> None:
    table = {"original": [[10, 0], [0, 10], [6, 4]]}
    of = seen_by(training=table) | {
        ("training", name, "original"): summarize_bias(
            torch.tensor(table["original"]), torch.zeros(3, dtype=int), CLASSES
        )
        for name in ("age", "gender×age")
    }
    named = [Prompt("an old chef", "chef", "named", (("age", "old"),)), *PROMPTS]
    found = results(["gender"], EVEN, named, Measured(of), {})["bias"]["training"]
    gender, age = found["gender"]["original"], found["age"]["original"]
    assert gender["bias"] == pytest.approx((1 + 1 + 0.2) / 3) and gender["prompts_naming"] == 0
    assert age["bias"] == pytest.approx((1 + 0.2) / 2) and age["prompts_naming"] == 1
    assert age["per_prompt"] == [None, 1, pytest.approx(0.2)] and age["counts"] == table["original"]
    assert age["frequencies"] == pytest.approx([6 / 20, 14 / 20])
    assert found["gender×age"]["original"]["prompts_naming"] == 1


def test_concepts_are_counted_apart_and_together() -> None:
    prompts = [
        Prompt(f"a {name}", name, concept) for name, concept in (("chef", "work"), ("polo", "sport"), ("nurse", "work"))
    ]
    measured = Measured(seen_by(training={"original": [[4, 0], [2, 2], [3, 1]]}))
    found = results(["gender"], EVEN, prompts, measured, {})
    sides = {concept: of["training"]["gender"]["original"] for concept, of in found["concepts"].items()}
    assert {concept: (side["bias"], side["prompts"]) for concept, side in sides.items()} == {
        "work": (0.75, 2),
        "sport": (0, 1),
    }
    assert sides["work"]["counts"] == [[4, 0], [3, 1]]
    assert found["bias"]["training"]["gender"]["original"]["bias"] == 0.5
    assert results(["gender"], EVEN, PROMPTS[:1] * 3, measured, {})["concepts"] == {}


def test_a_judge_that_errs_before_and_after_alike_is_no_sign_of_fooling() -> None:
    """It reads a tenth of the images wrongly, and so a fifth less of any bias."""
    sides = {"original": [[100, 0], [0, 100]], "ema": [[75, 25], [25, 75]]}
    erring = {"original": [[90, 10], [10, 90]], "ema": [[70, 30], [30, 70]]}
    found = results(["gender"], EVEN, PROMPTS, Measured(seen_by(training=sides, independent=erring)), {})
    assert found["classifier_overfit"] == {"independent": {"gender": pytest.approx(0)}}


def test_images_of_the_same_noise_are_compared_in_pairs() -> None:
    """One in five women became a man, and nobody the other way: chance alone would not."""
    before, after = [[20, 20], [20, 20]], [[24, 16], [24, 16]]
    alone = Measured(seen_by(training={"original": before, "ema": after}))
    pairs = {("training", "gender"): torch.tensor([[[20, 0, 0], [4, 16, 0], [0, 0, 0]]] * 2)}
    unpaired = results(["gender"], EVEN, PROMPTS, alone, {})
    paired = results(["gender"], EVEN, PROMPTS, Measured(alone.summaries, pairs=pairs), {})
    assert unpaired["bias"]["training"]["gender"]["p_value"] > 0.1
    assert paired["bias"]["training"]["gender"]["p_value"] < 0.05
    assert paired["run"]["paired"] and not unpaired["run"]["paired"]
