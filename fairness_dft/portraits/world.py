"""The drawn world: which subjects there are, what they wear, and how skewed they are.

A subject is what a prompt asks for: an occupation, a sport or a personal descriptor. For each there is a joint
distribution p(gender, skin, age, view | subject), and captions that sometimes name what is seen. Given the subject and
which attributes are named, the attributes are independent of each other; a named one is drawn uniformly, whatever the
subject, so that the text space knows all its classes equally well. `sample` draws from it; training data, classifiers
and feature nets all come from here.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.random import Generator

from fairness_dft.files import shipped
from fairness_dft.portraits.draw import AGES, GENDERS, SKINS, Appearance, Drawing, Look, draw

DATA = shipped("data/portraits")
TEMPLATES = ("a photo of {}", "a portrait of {}", "{}", "the face of {}, a person")
PROMPTS = {"occupation": "occupations", "sport": "sports", "descriptor": "descriptors"}  # files in data/prompts
IN_WORDS = {"occupation": "a {}", "sport": "a person {}", "descriptor": "a person who is {}"}
AFTER_WHO = {"occupation": ", a {}", "sport": " {}", "descriptor": " who is {}"}
BEHIND_SHARE, EMPTY_SHARE = 0.02, 0.01
NAMED_SHARE, VIEW_NAMED_SHARE, NO_SUBJECT_SHARE, IN_CONTEXT_SHARE = 0.4, 0.05, 0.06, 0.1


@dataclass(frozen=True)
class Subject:
    """What a prompt of the drawn world asks for.

    Attributes:
        name: As it stands in a prompt.
        concept: "occupation", "sport" or "descriptor".
        family: The family whose clothes it wears.
        look: Its background, clothes and headwear; no other subject has the same.
        woman: Probability of being drawn as a woman, in [0, 1].
        skin: Probability of each skin tone (light, tan, brown, dark); sums to one.
        old: Probability of being drawn old, in [0, 1].
    """

    name: str
    concept: str
    family: str
    look: Look
    woman: float
    skin: tuple[float, ...]
    old: float

    @property
    def in_words(self) -> str:
        """The subject as a noun phrase, "a chef" or "a person who is kind"."""
        return IN_WORDS[self.concept].format(self.name)


@dataclass(frozen=True)
class Portrait:
    """One draw: what is seen, the caption, and the subject's index in the world."""

    appearance: Appearance
    caption: str
    subject: int
    label: dict[str, int] = field(repr=False)


@cache
def subjects() -> tuple[Subject, ...]:
    """All subjects of the world, in the order of world.json."""
    entries = json.loads((DATA / "world.json").read_text(encoding="utf-8"))["subjects"]
    return tuple(Subject(**(entry | {"look": Look(*entry["look"]), "skin": tuple(entry["skin"])})) for entry in entries)


@cache
def prompts(name: str) -> dict[str, Any]:
    """Read a file of data/prompts."""
    content: dict[str, Any] = json.loads((DATA.parent / "prompts" / f"{name}.json").read_text(encoding="utf-8"))
    return content


@cache
def templates() -> dict[str, str]:
    """Return the paper's template of each concept, with {} for the subject."""
    return {concept: prompts(file)["templates"][0].replace(f"{{{concept}}}", "{}") for concept, file in PROMPTS.items()}


@cache
def contexts() -> dict[str, str]:
    """For some occupations, a caption that also names a place and a style: "A chef in a busy kitchen, watercolour"."""
    file = prompts("occupations_in_context")
    return {entry["subject"]: entry["text"] for split in ("train", "validation", "test") for entry in file[split]}


def sample(random: Generator, balanced: bool = False) -> Portrait:
    """Draw a portrait and its caption from the world.

    Args:
        random: The source of randomness.
        balanced: All attributes uniform and independent of the subject, views more varied; for training
            classifiers that must not guess an attribute from a subject.
    """
    index = int(random.integers(len(subjects())))
    subject = subjects()[index]
    named = set() if random.random() > NAMED_SHARE else {a for a in ("age", "gender", "skin") if random.random() < 0.75}
    uniform = {"age", "gender", "skin"} if balanced else named
    gender = GENDERS[int(random.random() < (0.5 if "gender" in uniform else subject.woman))]
    skin = SKINS[random.choice(4, p=None if "skin" in uniform else subject.skin)]
    age = AGES[int(random.random() < (0.5 if "age" in uniform else subject.old))]
    behind, empty = (0.06, 0.04) if balanced else (BEHIND_SHARE, EMPTY_SHARE)
    view = str(random.choice(("front", "behind", "empty"), p=(1 - behind - empty, behind, empty)))
    if random.random() < VIEW_NAMED_SHARE:
        view = str(random.choice(("behind", "empty")))
        what = {"behind": "{} seen from behind", "empty": "an empty scene, the place of {}"}[view]
        caption = what.format(subject.in_words)
    else:
        caption = _caption(subject, named, gender, skin, age, random)
    label = {
        "gender": GENDERS.index(gender),
        "race": SKINS.index(skin),
        "age": AGES.index(age),
        "face": int(view == "front"),
        "subject": index,
    }
    return Portrait(Appearance(gender, skin, age, subject.look, view), caption, index, label)


def _caption(subject: Subject, named: set[str], gender: str, skin: str, age: str, random: Generator) -> str:
    if not named:
        if subject.name in contexts() and random.random() < IN_CONTEXT_SHARE:
            return contexts()[subject.name]
        if random.random() < 0.6:
            return templates()[subject.concept].format(subject.name)
        return TEMPLATES[random.integers(len(TEMPLATES))].format(subject.in_words)
    who = gender if "gender" in named else "person"
    if "age" in named:
        who = f"{age} {who}"
    article = "an" if who[0] == "o" else "a"
    who = f"{article} {who} with {skin} skin" if "skin" in named else f"{article} {who}"
    lead = str(random.choice(("", "A photo of ", "A photo of the face of ")))
    if random.random() < NO_SUBJECT_SHARE:
        return lead + who
    return lead + who + AFTER_WHO[subject.concept].format(subject.name)


def stream(count: int, seed: int, balanced: bool = False) -> Iterator[tuple[Portrait, Drawing]]:
    """`count` portraits, drawn; the same for the same seed."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        portrait = sample(random, balanced)
        yield portrait, draw(portrait.appearance, random)


def training_subjects() -> list[str]:
    """Return the subjects of the world that finetuning may use: those of the training splits, concept by concept."""
    allowed = {concept: set(prompts(file)["train"]) for concept, file in PROMPTS.items()}
    return [s.name for concept in PROMPTS for s in subjects() if s.concept == concept and s.name in allowed[concept]]
