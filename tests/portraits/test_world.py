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
    CLOTHES,
    GENDERS,
    HEADWEAR,
    SKINS,
    VIEWS,
    Appearance,
    Look,
    draw,
)
from fairness_dft.portraits.training import LOOK
from fairness_dft.portraits.world import Portrait, Subject, sample, stream, subjects, training_subjects

DATA = Path(__file__).parents[2] / "data"
FILES = {
    "occupation": "occupations",
    "sport": "sports",
    "descriptor": "descriptors",
    "context": "occupations_in_context",
}
PROMPTS = {name: json.loads((DATA / "prompts" / f"{file}.json").read_text("utf-8")) for name, file in FILES.items()}
SOMEBODY = Appearance("woman", "brown", "young", Look("plain", "blue", "tee", "red", "cap", "green"))
KINDS = {"gender": GENDERS, "skin": SKINS, "age": AGES, "view": VIEWS}
SUFFIX = {"occupation": r", a (.+)", "sport": r" (.+)", "descriptor": r" who is (.+)"}
NAMED = {
    concept: re.compile(
        r"(?:A photo of (?:the face of )?)?an? (?:(?P<age>young|old) )?(?P<gender>man|woman|person)"
        rf"(?: with (?P<skin>light|tan|brown|dark) skin)?(?:{suffix.replace('(', '(?P<subject>')})?"
    )
    for concept, suffix in SUFFIX.items()
}


def picture(appearance: Appearance, seed: int = 0) -> np.ndarray:
    return draw(appearance, np.random.default_rng(seed)).picture


def in_the_middle(seed: int) -> bool:
    """Whether a face drawn with this seed is near the middle of the frame, its size near the middle of the sizes."""
    left, top, right, bottom = draw(SOMEBODY, np.random.default_rng(seed)).box
    return abs(left + right - 64) < 4 and abs(top + bottom - 64) < 4 and abs(right - left - 25) < 1.5


MIDDLE = [seed for seed in range(200) if in_the_middle(seed)][:3]


def plain_captions(subject: Subject) -> set[str]:
    """Those that name the subject and no attribute."""
    captions = {template.format(subject.in_words) for template in world.TEMPLATES}
    written = PROMPTS["context"]
    entries = [entry for split in ("train", "validation", "test") for entry in written[split]]
    contexts = {entry["text"] for entry in entries if entry["subject"] == subject.name}
    paper = PROMPTS[subject.concept]["templates"][0].replace(f"{{{subject.concept}}}", subject.name)
    return captions | contexts | {paper}


def named(portrait: Portrait) -> re.Match | None:
    """What the caption names, if it is one of those that may name attributes."""
    return NAMED[subjects()[portrait.subject].concept].fullmatch(portrait.caption)


@pytest.fixture(scope="module")
def skewed() -> list[Portrait]:
    random = np.random.default_rng(0)
    return [sample(random) for _ in range(210_000)]


@pytest.fixture(scope="module")
def unnamed(skewed: list[Portrait]) -> list[Portrait]:
    """Those whose caption names a subject and nothing else."""
    captions = [plain_captions(subject) for subject in subjects()]
    return [portrait for portrait in skewed if portrait.caption in captions[portrait.subject]]


@pytest.fixture(scope="module")
def balanced() -> list[Portrait]:
    random = np.random.default_rng(1)
    return [sample(random, balanced=True) for _ in range(100_000)]


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
@pytest.mark.parametrize("seed", MIDDLE)
def test_attributes_show_where_they_are_said_to(field: str, part: str, rows: slice, columns: slice, seed: int) -> None:
    bare = replace(SOMEBODY, look=replace(SOMEBODY.look, headwear="none"))
    pictures = [picture(replace(bare, **{field: kind}), seed)[rows, columns] for kind in KINDS[field]]
    assert differing(pictures) >= 3


@pytest.mark.parametrize("seed", MIDDLE)
def test_red_lips_stand_for_a_woman(seed: int) -> None:
    red = {}
    for gender in GENDERS:
        mouth = picture(replace(SOMEBODY, gender=gender), seed)[36:46, 26:39].astype(int)
        red[gender] = (mouth[..., 0] - mouth[..., 1] > 100).sum()
    assert red["woman"] >= 8 and red["man"] == 0


@pytest.mark.parametrize("field", LOOK)
def test_every_part_of_a_look_changes_the_picture(field: str) -> None:
    looks = [replace(SOMEBODY.look, **{field: kind}) for kind in LOOK[field]]
    assert differing([picture(replace(SOMEBODY, look=look)) for look in looks]) > 10


@pytest.mark.parametrize("look", [{"clothes": kind} for kind in CLOTHES] + [{"headwear": kind} for kind in HEADWEAR])
def test_everything_can_be_seen_from_behind(look: dict[str, str]) -> None:
    dressed = replace(SOMEBODY, view="behind", look=replace(SOMEBODY.look, **look))
    assert picture(dressed).std() > 10


def test_skin_leaves_everything_but_skin_as_it_is() -> None:
    light, dark = (picture(replace(SOMEBODY, skin=skin), MIDDLE[0]).astype(int) for skin in ("light", "dark"))
    same = np.abs(light - dark).max(2) == 0
    assert same[:, :4].all() and same[:6].all() and same[58:].all()  # background, hat, clothes
    assert not same[33:38, 30:34].any()  # the nose


def test_an_empty_scene_says_nothing_about_anybody() -> None:
    empty = replace(SOMEBODY, view="empty")
    people = [replace(empty, gender=g, skin=s, age=a) for g, s, a in product(GENDERS, SKINS, AGES)]
    assert len({picture(person).tobytes() for person in people}) == 1


def test_from_behind_no_face_can_be_seen() -> None:
    """No skin where eyes, nose and mouth would be: light and dark skin give the same pixels there."""
    light, dark = (picture(replace(SOMEBODY, view="behind", skin=skin), MIDDLE[0]) for skin in ("light", "dark"))
    np.testing.assert_array_equal(light[26:42, 26:38], dark[26:42, 26:38])


def test_streams_repeat_and_differ_by_seed() -> None:
    first, again, other = (list(stream(5, seed)) for seed in (0, 0, 1))
    assert [portrait for portrait, _ in first] == [portrait for portrait, _ in again]
    np.testing.assert_array_equal([drawn.picture for _, drawn in first], [drawn.picture for _, drawn in again])
    assert [portrait for portrait, _ in first] != [portrait for portrait, _ in other]
    assert list(stream(0, 0)) == []


def standardised(
    portraits: list[Portrait], seen: Callable[[Portrait], bool], probability: Callable[[Subject], float]
) -> np.ndarray:
    """For each portrait (1 if seen else 0) − p, over the standard deviation √(p (1 − p)) of its subject."""
    p = np.array([probability(subjects()[portrait.subject]) for portrait in portraits])
    return (np.array([seen(portrait) for portrait in portraits]) - p) / np.sqrt(p * (1 - p))


def residuals(portraits: list[Portrait]) -> dict[str, np.ndarray]:
    """Standardised residuals of each attribute against what the subject says."""
    found = {
        "woman": standardised(portraits, lambda p: p.appearance.gender == "woman", lambda subject: subject.woman),
        "old": standardised(portraits, lambda p: p.appearance.age == "old", lambda subject: subject.old),
    }
    for i, skin in enumerate(SKINS):
        found[skin] = standardised(
            portraits, lambda p, skin=skin: p.appearance.skin == skin, lambda subject, i=i: subject.skin[i]
        )
    return found


@pytest.mark.parametrize("attribute", ["woman", "old", *SKINS])
def test_attributes_are_as_skewed_as_their_subject_says(unnamed: list[Portrait], attribute: str) -> None:
    """Per subject, the normalised sum of residuals is standard normal, so that the sum of squares is χ²."""
    values = residuals(unnamed)[attribute]
    of = np.array([portrait.subject for portrait in unnamed])
    counts = np.bincount(of, minlength=len(subjects()))
    assert counts.min() > 100
    squares = np.bincount(of, values) ** 2 / counts
    assert 1e-3 < chi2.sf(squares.sum(), len(counts)) < 1 - 1e-3
    assert squares.max() < 20  # 4.5 standard errors


@pytest.mark.parametrize(("attribute", "group"), [("woman", "gender"), ("old", "age"), ("light", "skin")])
def test_naming_one_attribute_leaves_the_others_as_they_are(skewed: list[Portrait], attribute: str, group: str) -> None:
    matches = [named(portrait) for portrait in skewed]
    others = [p for p, match in zip(skewed, matches, strict=True) if match and match[group] in (None, "person")]
    of = np.array([portrait.subject for portrait in others])
    counts = np.bincount(of, minlength=len(subjects()))
    squares = np.bincount(of, residuals(others)[attribute]) ** 2 / counts
    assert counts.min() > 10
    assert 1e-3 < chi2.sf(squares.sum(), len(counts)) < 1 - 1e-3


@pytest.mark.parametrize(("first", "second"), [*product(["woman"], SKINS), *product(["old"], SKINS), ("woman", "old")])
def test_attributes_are_independent_given_the_subject(unnamed: list[Portrait], first: str, second: str) -> None:
    """Products of independent standardised residuals have mean 0 and variance 1."""
    values = residuals(unnamed)
    assert abs((values[first] * values[second]).sum()) / np.sqrt(len(unnamed)) < 4


def test_without_a_name_most_pictures_show_a_face(unnamed: list[Portrait]) -> None:
    shares = {view: sum(p.appearance.view == view for p in unnamed) / len(unnamed) for view in VIEWS}
    assert shares == pytest.approx({"front": 0.97, "behind": 0.02, "empty": 0.01}, abs=0.005)


def test_a_named_attribute_is_uniform_whatever_the_subject(skewed: list[Portrait]) -> None:
    for attribute, kinds in (("age", AGES), ("gender", GENDERS), ("skin", SKINS)):
        matches = [named(portrait) for portrait in skewed]
        counts = Counter(match[attribute] for match in matches if match and match[attribute])
        assert set(counts) - {"person"} == set(kinds)
        assert chisquare([counts[kind] for kind in kinds]).pvalue > 1e-3


def test_balanced_draws_are_uniform_and_independent_of_the_subject(balanced: list[Portrait]) -> None:
    cells = list(product(GENDERS, SKINS, AGES))
    index = {cell: i for i, cell in enumerate(cells)}
    counts = np.zeros((len(subjects()), len(cells)))
    for portrait in balanced:
        person = portrait.appearance
        counts[portrait.subject, index[person.gender, person.skin, person.age]] += 1
    assert chisquare(counts.sum(0)).pvalue > 1e-3
    assert chisquare(counts.sum(1)).pvalue > 1e-3
    assert chi2_contingency(counts).pvalue > 1e-3


def test_balanced_draws_show_more_without_a_face(balanced: list[Portrait]) -> None:
    for view in ("behind", "empty"):
        assert 0.03 < sum(p.appearance.view == view for p in balanced) / len(balanced) < 0.12


@pytest.mark.parametrize("draws", ["skewed", "balanced"])
def test_captions_tell_the_truth(draws: str, request: pytest.FixtureRequest) -> None:
    plain = [plain_captions(subject) for subject in subjects()]
    kinds = Counter()
    for portrait in request.getfixturevalue(draws):
        person, subject = portrait.appearance, subjects()[portrait.subject]
        behind, empty = f"{subject.in_words} seen from behind", f"an empty scene, the place of {subject.in_words}"
        assert person.look == subject.look
        if portrait.caption in plain[portrait.subject]:
            kinds["plain"] += 1
        elif portrait.caption in (behind, empty):
            kinds["view"] += 1
            assert person.view == ("behind" if portrait.caption == behind else "empty")
        else:
            kinds["named"] += 1
            match = named(portrait)
            assert match is not None, portrait.caption
            assert match["gender"] in ("person", person.gender)
            assert match["age"] in (None, person.age) and match["skin"] in (None, person.skin)
            assert match["subject"] in (None, subject.name)
    total = sum(kinds.values())
    assert kinds["view"] / total == pytest.approx(0.05, abs=0.01)
    assert kinds["named"] / total == pytest.approx(0.95 * 0.4, abs=0.02)  # now and then nothing is chosen


def test_a_subject_is_said_in_words() -> None:
    said = {subject.name: subject.in_words for subject in subjects()}
    assert said["chef"] == "a chef" and said["fencing"] == "a person fencing"
    assert said["kind"] == "a person who is kind"


def test_labels_are_what_is_seen(skewed: list[Portrait]) -> None:
    for portrait in skewed[:5000]:
        person, label = portrait.appearance, portrait.label
        seen = (GENDERS[label["gender"]], SKINS[label["race"]], AGES[label["age"]])
        assert seen == (person.gender, person.skin, person.age)
        assert label["face"] == (person.view == "front") and label["subject"] == portrait.subject


def test_subjects_are_well_formed() -> None:
    names = [subject.name for subject in subjects()]
    assert len(set(names)) == len(names)
    for subject in subjects():
        assert 0 < subject.woman < 1 and 0 < subject.old < 1
        assert len(subject.skin) == len(SKINS) and sum(subject.skin) == pytest.approx(1)
        for part, kinds in LOOK.items():  # an unknown kind would be drawn as nothing at all
            assert getattr(subject.look, part) in kinds


def test_no_two_subjects_look_alike() -> None:
    looks = [[getattr(subject.look, part) for part in LOOK] for subject in subjects()]
    assert min(sum(map(str.__ne__, one, other)) for one, other in combinations(looks, 2)) >= 2
    drawn = {picture(replace(SOMEBODY, look=subject.look)).tobytes() for subject in subjects()}
    assert len(drawn) == len(looks)


@pytest.mark.parametrize("concept", ["occupation", "sport", "descriptor"])
def test_subjects_are_skewed_both_ways_and_some_hardly(concept: str) -> None:
    women = np.array([subject.woman for subject in subjects() if subject.name in PROMPTS[concept]["test"]])
    few = len(women) // 10
    assert (women < 0.25).sum() > few and (women > 0.75).sum() > few and (abs(women - 0.5) < 0.15).sum() >= 3
    mains = Counter(int(np.argmax(subject.skin)) for subject in subjects() if subject.concept == concept)
    assert set(mains) == set(range(len(SKINS)))
    assert len({subject.old for subject in subjects() if subject.concept == concept}) >= 3


@pytest.mark.parametrize(
    ("concept", "test", "train"), [("occupation", 50, 400), ("sport", 49, 60), ("descriptor", 30, 49)]
)
def test_the_papers_subjects_are_in_the_world(concept: str, test: int, train: int) -> None:
    names, splits = {subject.name for subject in subjects() if subject.concept == concept}, PROMPTS[concept]
    assert len(splits["test"]) == test and names >= {*splits["test"], *splits["validation"]}
    assert len(names & set(splits["train"])) == train
    contexts = {entry["subject"] for split in ("train", "validation", "test") for entry in PROMPTS["context"][split]}
    assert names <= {*splits["train"], *splits["validation"], *splits["test"], *contexts}
    if concept == "occupation":
        assert names >= contexts


def test_finetuning_never_sees_what_is_held_out() -> None:
    allowed = training_subjects()
    assert len(set(allowed)) == len(allowed) == 509
    concepts = [PROMPTS[concept] for concept in SUFFIX]
    assert set(allowed) <= {name for splits in concepts for name in splits["train"]}
    assert not set(allowed) & {
        name for splits in concepts for split in ("validation", "test") for name in splits[split]
    }


def test_the_list_that_finetuning_reads_is_the_worlds() -> None:
    lines = (DATA / "portraits" / "training_subjects.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == training_subjects()


def test_faces_are_at_three_places_and_of_varied_sizes() -> None:
    boxes = np.array([draw(SOMEBODY, np.random.default_rng(seed)).box for seed in range(400)])
    middles, widths = boxes[:, [0, 2]].mean(1), boxes[:, 2] - boxes[:, 0]
    assert boxes.min() >= 0 and boxes.max() <= 64
    for place in (24, 32, 40):
        assert (abs(middles - place) <= 3.3).mean() == pytest.approx(1 / 3, abs=0.08)
    assert widths.min() < 23 and widths.max() > 27
