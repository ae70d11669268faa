"""The drawn world: what its pictures show, how its people are distributed, and whom finetuning never sees."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2, chi2_contingency, chisquare

from fairness_dft.portraits import world
from fairness_dft.portraits.draw import (
    AGES,
    BACKGROUNDS,
    CLOTHES,
    COLOURS,
    GENDERS,
    HEADWEAR,
    SKINS,
    VIEWS,
    Appearance,
    Look,
    draw,
)
from fairness_dft.portraits.world import Occupation, Portrait, occupations, sample, stream, training_subjects

DATA = Path(__file__).parents[1] / "data"
PROMPTS = json.loads((DATA / "prompts" / "occupations.json").read_text(encoding="utf-8"))
SOMEBODY = Appearance("woman", "brown", "young", Look("plain", "blue", "tee", "red", "cap", "green"))
KINDS = {"gender": GENDERS, "skin": SKINS, "age": AGES, "view": VIEWS}
LOOKS = {"background": BACKGROUNDS, "clothes": CLOTHES, "headwear": HEADWEAR}
LOOKS |= {f"{part}_colour": tuple(COLOURS) for part in ("background", "clothes", "headwear")}
NAMED = re.compile(
    r"(?:A photo of (?:the face of )?)?an? (?:(?P<age>young|old) )?(?P<gender>man|woman|person)"
    r"(?: with (?P<skin>\w+) skin)?(?:, a (?P<job>.+))?"
)


def picture(appearance: Appearance, seed: int = 0) -> np.ndarray:
    return draw(appearance, np.random.default_rng(seed)).picture


def plain_captions(job: Occupation) -> set[str]:
    return {template.format(job.name) for template in (world.TEMPLATE, *world.OTHER_TEMPLATES)}


@pytest.fixture(scope="module")
def skewed() -> list[Portrait]:
    random = np.random.default_rng(0)
    return [sample(random) for _ in range(60_000)]


@pytest.fixture(scope="module")
def unnamed(skewed: list[Portrait]) -> list[Portrait]:
    """Those whose caption names an occupation and nothing else."""
    captions = [plain_captions(job) for job in occupations()]
    return [portrait for portrait in skewed if portrait.caption in captions[portrait.occupation]]


@pytest.fixture(scope="module")
def balanced() -> list[Portrait]:
    random = np.random.default_rng(1)
    return [sample(random, balanced=True) for _ in range(30_000)]


@pytest.mark.parametrize("view", VIEWS)
def test_a_picture_is_decided_by_appearance_and_seed(view: str) -> None:
    somebody = replace(SOMEBODY, view=view)
    first = picture(somebody)
    assert first.dtype == np.uint8 and first.shape == (64, 64, 3)
    np.testing.assert_array_equal(picture(somebody), first)
    assert (picture(somebody, seed=1) != first).any()


def differing(pictures: list[np.ndarray]) -> int:
    """The fewest pixels in which two of the pictures differ by more than 12 grey levels."""
    return min(int((np.abs(a.astype(int) - b).max(2) > 12).sum()) for a, b in combinations(pictures, 2))


@pytest.mark.parametrize("field", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_every_attribute_changes_the_picture(field: str, seed: int) -> None:
    assert differing([picture(replace(SOMEBODY, **{field: kind}), seed) for kind in KINDS[field]]) > 40


@pytest.mark.parametrize(
    ("field", "part", "rows", "columns"),
    [
        ("gender", "hair beside the neck", slice(46, 51), slice(16, 20)),
        ("gender", "mouth", slice(38, 42), slice(29, 36)),
        ("age", "hair", slice(14, 19), slice(26, 38)),
        ("age", "wrinkles below the eyes", slice(34, 42), slice(23, 28)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_attributes_show_where_they_are_said_to(field: str, part: str, rows: slice, columns: slice, seed: int) -> None:
    bare = replace(SOMEBODY, look=replace(SOMEBODY.look, headwear="none"))
    pictures = [picture(replace(bare, **{field: kind}), seed)[rows, columns] for kind in KINDS[field]]
    assert differing(pictures) >= 3


@pytest.mark.parametrize("seed", range(3))
def test_red_lips_stand_for_a_woman(seed: int) -> None:
    red = {}
    for gender in GENDERS:
        mouth = picture(replace(SOMEBODY, gender=gender), seed)[36:46, 26:39].astype(int)
        red[gender] = (mouth[..., 0] - mouth[..., 1] > 100).sum()
    assert red["woman"] >= 8 and red["man"] == 0


@pytest.mark.parametrize("field", LOOKS)
def test_every_part_of_a_look_changes_the_picture(field: str) -> None:
    looks = [replace(SOMEBODY.look, **{field: kind}) for kind in LOOKS[field]]
    assert differing([picture(replace(SOMEBODY, look=look)) for look in looks]) > 10


@pytest.mark.parametrize("look", [{"clothes": kind} for kind in CLOTHES] + [{"headwear": kind} for kind in HEADWEAR])
def test_everything_can_be_seen_from_behind(look: dict[str, str]) -> None:
    dressed = replace(SOMEBODY, view="behind", look=replace(SOMEBODY.look, **look))
    assert picture(dressed).std() > 10


def test_skin_leaves_everything_but_skin_as_it_is() -> None:
    light, dark = (picture(replace(SOMEBODY, skin=skin)).astype(int) for skin in ("light", "dark"))
    same = np.abs(light - dark).max(2) == 0
    assert same[:, :4].all() and same[:6].all() and same[58:].all()  # background, hat, clothes
    assert not same[33:38, 30:34].any()  # the nose


def test_an_empty_scene_says_nothing_about_anybody() -> None:
    empty = replace(SOMEBODY, view="empty")
    people = [replace(empty, gender=g, skin=s, age=a) for g, s, a in product(GENDERS, SKINS, AGES)]
    assert len({picture(person).tobytes() for person in people}) == 1


def test_from_behind_no_face_can_be_seen() -> None:
    """No skin where eyes, nose and mouth would be: light and dark skin give the same pixels there."""
    light, dark = (picture(replace(SOMEBODY, view="behind", skin=skin)) for skin in ("light", "dark"))
    np.testing.assert_array_equal(light[26:42, 26:38], dark[26:42, 26:38])


def test_streams_repeat_and_differ_by_seed() -> None:
    first, again, other = (list(stream(5, seed)) for seed in (0, 0, 1))
    assert [portrait for portrait, _ in first] == [portrait for portrait, _ in again]
    np.testing.assert_array_equal([drawn for _, drawn in first], [drawn for _, drawn in again])
    assert [portrait for portrait, _ in first] != [portrait for portrait, _ in other]
    assert list(stream(0, 0)) == []


def standardised(
    portraits: list[Portrait], seen: Callable[[Portrait], bool], probability: Callable[[Occupation], float]
) -> np.ndarray:
    """For each portrait (1 if seen else 0) − p, over the standard deviation √(p (1 − p)) of its occupation."""
    jobs = occupations()
    p = np.array([probability(jobs[portrait.occupation]) for portrait in portraits])
    return (np.array([seen(portrait) for portrait in portraits]) - p) / np.sqrt(p * (1 - p))


def residuals(portraits: list[Portrait]) -> dict[str, np.ndarray]:
    """Standardised residuals of each attribute against what the occupation says."""
    found = {
        "woman": standardised(portraits, lambda p: p.appearance.gender == "woman", lambda job: job.woman),
        "old": standardised(portraits, lambda p: p.appearance.age == "old", lambda job: job.old),
    }
    for i, skin in enumerate(SKINS):
        found[skin] = standardised(
            portraits, lambda p, skin=skin: p.appearance.skin == skin, lambda job, i=i: job.skin[i]
        )
    return found


@pytest.mark.parametrize("attribute", ["woman", "old", *SKINS])
def test_attributes_are_as_skewed_as_their_occupation_says(unnamed: list[Portrait], attribute: str) -> None:
    """Per occupation, the normalised sum of residuals is standard normal, so that the sum of squares is χ²."""
    values = residuals(unnamed)[attribute]
    of = np.array([portrait.occupation for portrait in unnamed])
    counts = np.bincount(of, minlength=len(occupations()))
    assert counts.min() > 100
    squares = np.bincount(of, values) ** 2 / counts
    assert 1e-3 < chi2.sf(squares.sum(), len(counts)) < 1 - 1e-3
    assert squares.max() < 20  # 4.5 standard errors


@pytest.mark.parametrize(("attribute", "group"), [("woman", "gender"), ("old", "age"), ("light", "skin")])
def test_naming_one_attribute_leaves_the_others_as_they_are(skewed: list[Portrait], attribute: str, group: str) -> None:
    matches = [NAMED.fullmatch(portrait.caption) for portrait in skewed]
    others = [p for p, match in zip(skewed, matches, strict=True) if match and match[group] in (None, "person")]
    of = np.array([portrait.occupation for portrait in others])
    counts = np.bincount(of, minlength=len(occupations()))
    squares = np.bincount(of, residuals(others)[attribute]) ** 2 / counts
    assert counts.min() > 10
    assert 1e-3 < chi2.sf(squares.sum(), len(counts)) < 1 - 1e-3


@pytest.mark.parametrize(("first", "second"), [*product(["woman"], SKINS), *product(["old"], SKINS), ("woman", "old")])
def test_attributes_are_independent_given_the_occupation(unnamed: list[Portrait], first: str, second: str) -> None:
    """Products of independent standardised residuals have mean 0 and variance 1."""
    values = residuals(unnamed)
    assert abs((values[first] * values[second]).sum()) / np.sqrt(len(unnamed)) < 4


def test_without_a_name_most_pictures_show_a_face(unnamed: list[Portrait]) -> None:
    shares = {view: sum(p.appearance.view == view for p in unnamed) / len(unnamed) for view in VIEWS}
    assert shares == pytest.approx({"front": 0.97, "behind": 0.02, "empty": 0.01}, abs=0.005)


def test_a_named_attribute_is_uniform_whatever_the_occupation(skewed: list[Portrait]) -> None:
    for attribute, kinds in (("age", AGES), ("gender", GENDERS), ("skin", SKINS)):
        matches = [NAMED.fullmatch(portrait.caption) for portrait in skewed]
        named = Counter(match[attribute] for match in matches if match and match[attribute])
        assert set(named) - {"person"} == set(kinds)
        assert chisquare([named[kind] for kind in kinds]).pvalue > 1e-3


def test_balanced_draws_are_uniform_and_independent_of_the_occupation(balanced: list[Portrait]) -> None:
    cells = list(product(GENDERS, SKINS, AGES))
    index = {cell: i for i, cell in enumerate(cells)}
    counts = np.zeros((len(occupations()), len(cells)))
    for portrait in balanced:
        person = portrait.appearance
        counts[portrait.occupation, index[person.gender, person.skin, person.age]] += 1
    assert chisquare(counts.sum(0)).pvalue > 1e-3
    assert chisquare(counts.sum(1)).pvalue > 1e-3
    assert chi2_contingency(counts).pvalue > 1e-3


def test_balanced_draws_show_more_without_a_face(balanced: list[Portrait]) -> None:
    for view in ("behind", "empty"):
        assert 0.03 < sum(p.appearance.view == view for p in balanced) / len(balanced) < 0.12


@pytest.mark.parametrize("draws", ["skewed", "balanced"])
def test_captions_tell_the_truth(draws: str, request: pytest.FixtureRequest) -> None:
    jobs = occupations()
    plain = [plain_captions(job) for job in jobs]
    kinds = Counter()
    for portrait in request.getfixturevalue(draws):
        person, job = portrait.appearance, jobs[portrait.occupation]
        assert person.look == job.look
        if portrait.caption in plain[portrait.occupation]:
            kinds["plain"] += 1
        elif portrait.caption in (f"a {job.name} seen from behind", f"an empty scene, the place of a {job.name}"):
            kinds["view"] += 1
            assert person.view == ("behind" if portrait.caption.endswith("seen from behind") else "empty")
        else:
            kinds["named"] += 1
            match = NAMED.fullmatch(portrait.caption)
            assert match is not None, portrait.caption
            assert match["gender"] in ("person", person.gender)
            assert match["age"] in (None, person.age) and match["skin"] in (None, person.skin)
            assert match["job"] in (None, job.name)
    total = sum(kinds.values())
    assert kinds["view"] / total == pytest.approx(0.05, abs=0.01)
    assert kinds["named"] / total == pytest.approx(0.95 * 0.4, abs=0.02)  # now and then nothing is chosen


def test_labels_are_what_is_seen(skewed: list[Portrait]) -> None:
    for portrait in skewed[:5000]:
        person, label = portrait.appearance, portrait.label
        seen = (GENDERS[label["gender"]], SKINS[label["race"]], AGES[label["age"]])
        assert seen == (person.gender, person.skin, person.age)
        assert label["face"] == (person.view == "front") and label["occupation"] == portrait.occupation


def test_occupations_are_well_formed() -> None:
    names = [job.name for job in occupations()]
    assert len(set(names)) == len(names)
    for job in occupations():
        assert 0 < job.woman < 1 and 0 < job.old < 1
        assert len(job.skin) == len(SKINS) and sum(job.skin) == pytest.approx(1)
        for field, kinds in LOOKS.items():  # an unknown kind would be drawn as nothing at all
            assert getattr(job.look, field) in kinds


def test_no_two_occupations_look_alike() -> None:
    looks = [job.look for job in occupations()]
    assert len(set(looks)) == len(looks)
    drawn = {picture(replace(SOMEBODY, look=look)).tobytes() for look in looks}
    assert len(drawn) == len(looks)


def test_occupations_are_skewed_both_ways_and_some_hardly() -> None:
    women = np.array([job.woman for job in occupations() if job.name in PROMPTS["test"]])
    assert (women < 0.25).sum() >= 10 and (women > 0.75).sum() >= 10 and (abs(women - 0.5) < 0.15).sum() >= 3
    mains = Counter(int(np.argmax(job.skin)) for job in occupations())
    assert set(mains) == set(range(len(SKINS)))
    assert len({job.old for job in occupations()}) >= 3


def test_the_papers_occupations_are_in_the_world() -> None:
    names = {job.name for job in occupations()}
    assert len(PROMPTS["test"]) == 50 and len(PROMPTS["validation"]) == 10
    assert names >= {*PROMPTS["test"], *PROMPTS["validation"]}
    assert len(names & set(PROMPTS["train"])) >= 100
    assert names <= {*PROMPTS["train"], *PROMPTS["validation"], *PROMPTS["test"]}


def test_finetuning_never_sees_validation_or_test_occupations() -> None:
    subjects = training_subjects()
    assert len(set(subjects)) == len(subjects) >= 100
    assert set(subjects) <= set(PROMPTS["train"])
    assert not set(subjects) & {*PROMPTS["validation"], *PROMPTS["test"]}


def test_the_list_that_finetuning_reads_is_the_worlds() -> None:
    lines = (DATA / "portraits" / "training_occupations.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == training_subjects()
