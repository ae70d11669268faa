"""Figures of a test: targets, prompts that name attributes, classifier overfit; the file and its documentation."""

import json
import math
import re
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import fixed_counts
import pytest
import torch
from fixed_counts import fixed_results
from printing import printed

from fairness_dft import __version__
from fairness_dft.metrics.bias import class_bias, summarize_bias
from fairness_dft.metrics.image_readings import Readings
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.build import Measured, build_results
from fairness_dft.reports.csv_tables import IMAGE_COLUMNS, PROMPT_COLUMNS, image_table
from fairness_dft.reports.results import (
    VERSION,
    Adherence,
    AttributeResult,
    Distance,
    ModelBias,
    NamedShare,
    Results,
    RunFacts,
)

CLASSES = ("man", "woman")
PROMPTS = [Prompt(f"a {subject}", subject, "occupation") for subject in ("chef", "judge")]


def seen_by(**classifiers: dict[str, list[list[int]]]) -> dict:
    """Return summaries of gender by each classifier, from tables of counts by model."""
    return {
        (classifier, "gender", model): summarize_bias(
            torch.tensor(counts), torch.zeros(len(counts), dtype=int), CLASSES
        )
        for classifier, models in classifiers.items()
        for model, counts in models.items()
    }


EVEN = {"gender": {"man": 0.5, "woman": 0.5}}


def test_what_only_the_training_classifier_sees() -> None:
    sides = {"original": [[10, 0], [0, 10]], "ema": [[5, 5], [5, 5]]}
    fooled = {"original": [[10, 0], [0, 10]], "ema": [[9, 1], [2, 8]]}
    agreement = {("training", "independent", "gender", "ema"): 0.7}
    measured = Measured(seen_by(training=sides, independent=fooled, same=sides), agreement=agreement)
    found = build_results(["gender"], EVEN, PROMPTS, measured)
    assert found.agreement == {"training": {"independent": {"gender": {"ema": 0.7}}}}
    assert build_results(["age"], {"age": {}}, PROMPTS, measured).classifier_overfit == {}  # gender was not aligned
    assert found.classifier_overfit == {"independent": {"gender": pytest.approx(0.7)}, "same": {"gender": 0}}
    alone = seen_by(training={"original": [[1, 2], [2, 1]]}, other={"original": [[1, 2], [2, 1]]})
    assert build_results(["gender"], EVEN, PROMPTS, Measured(alone)).classifier_overfit == {}


def test_an_improvement_that_may_be_chance_has_no_overfit() -> None:
    for before, after in (([[5, 5], [5, 5]], [[5, 5], [5, 5]]), ([[6, 4], [5, 5]], [[5, 5], [5, 5]])):
        sides = {"original": before, "ema": after}
        measured = Measured(seen_by(training=sides, independent=sides))
        assert build_results(["gender"], EVEN, PROMPTS, measured).classifier_overfit["independent"] == {"gender": None}


@pytest.mark.parametrize(
    ("training", "independent"),
    [
        (([24, 16], [40, 0]), ([24, 16], [32, 8])),  # it rose
        (([20, 20], [40, 0]), ([24, 16], [20, 20])),  # there was nothing to reduce
        (([40, 0], [20, 20]), ([20, 20], [20, 20])),  # the other classifier saw nothing to reduce
    ],
)
def test_no_overfit_is_reported_where_the_bias_did_not_fall(training: tuple, independent: tuple) -> None:
    sides = [{"original": [before] * 2, "ema": [after] * 2} for before, after in (training, independent)]
    results = build_results(["gender"], EVEN, PROMPTS, Measured(seen_by(training=sides[0], independent=sides[1])))
    assert results.bias["training"]["gender"].p_value < 0.05
    assert results.classifier_overfit == {"independent": {"gender": None}}


def test_unequal_targets_are_measured_by_their_distance() -> None:
    """From even to three women of four: the bias rises, and that is what was wanted."""
    sides = {"original": [[20, 20], [20, 20]], "ema": [[10, 30], [10, 30]]}
    fooled = {"original": [[20, 20], [20, 20]], "ema": [[15, 25], [15, 25]]}
    target = {"gender": {"man": 0.25, "woman": 0.75}}
    found = build_results(["gender"], target, PROMPTS, Measured(seen_by(training=sides, independent=fooled)))
    models = found.bias["training"]["gender"]
    assert models.ema.bias > models.original.bias
    assert [side.distance.total_variation_by_prompt for side in models.models.values()] == [0.25, 0]
    assert models.p_value < 0.05
    assert found.classifier_overfit == {"independent": {"gender": pytest.approx(0.5)}}
    shown = printed(found).split("Distance of a prompt from its target")[1]
    cells = [line.split("│")[1:-1] for line in shown.splitlines() if "│" in line and "training" in line]
    assert [cell.strip() for cell in cells[0]][:4] == ["gender", "training", "0.25", "0.00"]


def test_each_prompt_is_compared_with_its_own_target() -> None:
    sides = {"original": [[9, 1], [9, 1]], "ema": [[9, 1], [5, 5]]}
    own = {"a chef": {"gender": {"man": 0.9, "woman": 0.1}}}
    found = build_results(["gender"], EVEN, PROMPTS, Measured(seen_by(training=sides)), own_targets=own)
    models = found.bias["training"]["gender"]
    assert list(models.original.distance.per_prompt) == pytest.approx([0, 0.4])
    assert list(models.ema.distance.per_prompt) == pytest.approx([0, 0])
    assert models.ema.distance.total_variation == pytest.approx(0)  # of 14 men among 20, who are wanted
    assert models.measure == "distance" and found.own_targets == own
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
    found = build_results(["gender"], EVEN, named, Measured(of)).bias["training"]
    gender, age = found["gender"].original, found["age"].original
    assert gender.bias == pytest.approx((1 + 1 + 0.2) / 3) and gender.prompts_naming == 0
    assert age.bias == pytest.approx((1 + 0.2) / 2) and age.prompts_naming == 1
    assert age.per_prompt == (None, 1, pytest.approx(0.2)) and age.counts == tuple(map(tuple, table["original"]))
    assert list(age.frequencies) == pytest.approx([6 / 20, 14 / 20])
    assert found["gender×age"].original.prompts_naming == 1


def test_concepts_are_counted_separately_and_together() -> None:
    prompts = [
        Prompt(f"a {name}", name, concept) for name, concept in (("chef", "work"), ("polo", "sport"), ("nurse", "work"))
    ]
    measured = Measured(seen_by(training={"original": [[4, 0], [2, 2], [3, 1]]}))
    found = build_results(["gender"], EVEN, prompts, measured)
    sides = {concept: seen["training"]["gender"].original for concept, seen in found.concepts.items()}
    assert {concept: (side.bias, side.prompts) for concept, side in sides.items()} == {
        "work": (0.75, 2),
        "sport": (0, 1),
    }
    assert sides["work"].counts == ((4, 0), (3, 1))
    assert found.bias["training"]["gender"].original.bias == 0.5
    assert build_results(["gender"], EVEN, PROMPTS[:1] * 3, measured).concepts == {}


def test_a_classifier_that_errs_before_and_after_alike_is_no_sign_of_overfit() -> None:
    """It reads a tenth of the images wrongly, and so a fifth less of any bias."""
    sides = {"original": [[100, 0], [0, 100]], "ema": [[75, 25], [25, 75]]}
    erring = {"original": [[90, 10], [10, 90]], "ema": [[70, 30], [30, 70]]}
    found = build_results(["gender"], EVEN, PROMPTS, Measured(seen_by(training=sides, independent=erring)))
    assert found.classifier_overfit == {"independent": {"gender": pytest.approx(0)}}


def test_images_of_the_same_noise_are_compared_in_pairs() -> None:
    """One in five women became a man, and nobody the other way: chance alone would not."""
    before, after = [[20, 20], [20, 20]], [[24, 16], [24, 16]]
    alone = Measured(seen_by(training={"original": before, "ema": after}))
    pairs = {("training", "gender"): torch.tensor([[[20, 0, 0], [4, 16, 0], [0, 0, 0]]] * 2)}
    unpaired = build_results(["gender"], EVEN, PROMPTS, alone)
    paired = build_results(["gender"], EVEN, PROMPTS, Measured(alone.summaries, pairs=pairs))
    assert unpaired.bias["training"]["gender"].p_value > 0.1
    assert paired.bias["training"]["gender"].p_value < 0.05
    assert paired.run.paired and not unpaired.run.paired


RENAMED = {"gap": "unbiased_rms_gap", "no_face_share": "no_face_images", "prompts_without_face": "prompts_no_face"}
RENAMED |= {f"gap_{end}": f"unbiased_rms_gap_{end}" for end in ("low", "high", "by_chance")}


def of_version_3(attribute: dict) -> dict:
    """Figures of one attribute as version 3 laid them out, in the layout of version 4 without what is new in it."""
    models = {model: dict(attribute[model]) for model in ("original", "ema")}
    for side in models.values():
        classes = side.pop("classes")
        for old, new in RENAMED.items():
            side[new] = side.pop(old)
        side.setdefault("distance", None)
    rest = {key: attribute[key] for key in ("measure", "drift", "p_value")}
    return {"classes": classes, "maximum": 2 / len(classes), **models, **rest}


def test_figures_of_fixed_counts_are_those_that_version_3_recorded() -> None:
    file = Path(__file__).with_name("figures_of_version_3.json")
    recorded, content = json.loads(file.read_text(encoding="utf-8")), fixed_results().as_dict()
    compared = 0
    for ours, theirs in (
        (content["bias"], recorded["bias"]),
        *((content["concepts"][concept], recorded["concepts"][concept]) for concept in ("work", "sport")),
    ):
        assert ours.keys() == theirs.keys()
        for classifier, seen in theirs.items():
            for name, attribute in seen.items():
                figures = dict(ours[classifier][name])
                figures.pop("pairs")
                assert figures == of_version_3(attribute)
                compared += 1
    assert compared == 18
    for key in ("attributes", "target", "own_targets", "agreement", "prompt_adherence", "classifier_overfit", "kept"):
        assert content[key] == recorded[key], key


def test_pairs_are_counted_over_the_prompts_that_enter_the_means() -> None:
    gender = fixed_results().bias["training"]["gender"]
    assert gender.pairs == tuple(map(tuple, torch.tensor(fixed_counts.PAIRS).sum(0).tolist()))
    assert fixed_results().concepts["sport"]["training"]["gender"].pairs == ((7, 5, 0), (0, 0, 0), (0, 0, 0))
    assert fixed_results().bias["independent"]["gender"].pairs is None


def test_results_survive_the_way_to_the_file_and_back(tmp_path: Path) -> None:
    written = fixed_results()
    file = tmp_path / "new" / "folder" / "results.json"
    written.write(file)
    content = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert content["version"] == VERSION == 4 and "perceived" in content["note"]
    assert content["kept"]["dino"] == {"ema": None}
    assert Results.read(file) == written
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


def test_not_a_number_is_null_in_the_file(tmp_path: Path) -> None:
    odd = replace(fixed_results(), kept={"clip_t": {"ema": math.nan, "original": math.inf}})
    odd.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json").kept == {"clip_t": {"ema": None, "original": None}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content | {"version": 3},
            "is of version 3, but must be of version 4: measure the model again",
        ),
        (lambda content: content | {"more": 1}, "is not a results file of this program: measure the model again"),
        (lambda content: {}, "is not a results file of this program: measure the model again"),
        (lambda content: [], "is not a results file of this program: measure the model again"),
        (lambda content: content | {"run": None}, "is not a results file of this program: measure the model again"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, change, message: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(change(fixed_results().as_dict())), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        Results.read(file)
    assert "\n" not in str(error.value) and repr(str(file)) in str(error.value)


def test_half_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text('{"version": 4, ', encoding="utf-8")
    with pytest.raises(ValueError, match="is not a results file of this program"):
        Results.read(file)


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    fixed_results().write(file)
    before = file.read_bytes()

    def half(path: Path, text: str, **options: str) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        replace(fixed_results(), attributes=("age",)).write(file)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_base_model_must_be_measured() -> None:
    only = {key: summary for key, summary in fixed_counts.measured().summaries.items() if key[2] == "ema"}
    with pytest.raises(ValueError, match="the base model was not measured: training has no counts of gender"):
        build_results(["gender"], EVEN, fixed_counts.PROMPTS, Measured(only))


def test_one_model_alone_has_no_drift() -> None:
    alone = {key: summary for key, summary in fixed_counts.measured().summaries.items() if key[2] == "original"}
    results = build_results(["gender"], EVEN, fixed_counts.PROMPTS, Measured(alone))
    gender = results.bias["training"]["gender"]
    assert (gender.ema, gender.drift, gender.p_value, gender.pairs) == (None, None, None, None)
    assert gender.last is gender.original and not results.compared and fixed_results().compared


def test_maximum_is_the_bias_of_one_class_alone() -> None:
    for _, _, result in fixed_results().rows():
        alone = torch.eye(len(result.classes))[0]
        assert result.maximum == pytest.approx(float(class_bias(alone)))


@pytest.mark.parametrize("documented", [Results, AttributeResult, ModelBias, Distance, NamedShare, Adherence, RunFacts])
def test_the_documentation_names_the_keys_of_the_file(documented: type) -> None:
    """Each dataclass has a section in docs/results.md with a table of exactly its fields, in their order."""
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    section = text.split(f"`{documented.__name__}`\n", 1)[1].split("\n## ", 1)[0].split("\n### ", 1)[0]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| `")]
    expected = [f"`{field.name}`" for field in fields(documented)]
    assert rows == (["`version`", "`note`"] if documented is Results else []) + expected


def test_the_documentation_names_the_columns_of_the_tables() -> None:
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    for name, columns in (("per_prompt.csv", PROMPT_COLUMNS), ("per_image.csv", IMAGE_COLUMNS)):
        section = text.split(f"`{name}`\n", 1)[1].split("\n## ", 1)[0]
        cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
        documented = re.findall(r"`([^`]+)`", " ".join(cells))
        assert tuple(column for column in documented if "CLASSIFIER" not in column) == columns
    parts = [column.removeprefix("CLASSIFIER.") for column in documented if "CLASSIFIER" in column]
    attribute = [part.replace("ATTRIBUTE", "gender") for part in parts]
    readings = {("first", "original"): Readings(*torch.zeros(3, 0), torch.zeros(0, 4), {"gender": torch.zeros(0, 2)})}
    table = image_table([], readings, {"first": {"gender": ("man", "woman")}})
    assert [column.removeprefix("first.") for column in table.columns[len(IMAGE_COLUMNS) :]] == attribute


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "fairness_dft":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("fairness_dft.reports.results.version", version)
    facts = RunFacts.here(steps=3)
    assert facts.versions["fairness_dft"] == __version__ and facts.steps == 3
    assert len(facts.date) == 10 and facts.machine
