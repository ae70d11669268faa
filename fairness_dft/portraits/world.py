"""The drawn world: which occupations there are, what they wear, and how skewed they are.

A joint distribution p(gender, skin, age, view | occupation), and captions that sometimes name what is seen.
Given the occupation and which attributes are named, the attributes are independent of each other; a named one
is drawn uniformly, whatever the occupation, so that the text space knows all its classes equally well. `sample`
draws from it; training data, classifiers and feature nets all come from here.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import Generator

from fairness_dft.portraits.draw import AGES, GENDERS, SKINS, Appearance, Look, draw

DATA = Path(__file__).parents[2] / "data" / "portraits"
TEMPLATE = "A photo of the face of a {}, a person"
OTHER_TEMPLATES = ("a photo of a {}", "a portrait of a {}", "a {}", "the face of a {}, a person")
BEHIND_SHARE, EMPTY_SHARE = 0.02, 0.01
NAMED_SHARE, VIEW_NAMED_SHARE, NO_OCCUPATION_SHARE = 0.4, 0.05, 0.06


@dataclass(frozen=True)
class Occupation:
    """An occupation of the drawn world.

    Attributes:
        name: as it stands in a prompt.
        family: the family whose clothes it wears.
        look: its background, clothes and headwear; no other occupation has the same.
        woman: probability of being drawn as a woman, in [0, 1].
        skin: probability of each skin tone (light, tan, brown, dark); sums to one.
        old: probability of being drawn old, in [0, 1].
    """

    name: str
    family: str
    look: Look
    woman: float
    skin: tuple[float, ...]
    old: float


@dataclass(frozen=True)
class Portrait:
    """One draw: what is seen, the caption, and the occupation's index in the world."""

    appearance: Appearance
    caption: str
    occupation: int
    label: dict[str, int] = field(repr=False)


@cache
def occupations() -> tuple[Occupation, ...]:
    """All occupations of the world, in the order of world.json."""
    entries = json.loads((DATA / "world.json").read_text(encoding="utf-8"))["occupations"]
    return tuple(
        Occupation(**(entry | {"look": Look(*entry["look"]), "skin": tuple(entry["skin"])})) for entry in entries
    )


def sample(random: Generator, balanced: bool = False) -> Portrait:
    """Draw a portrait and its caption from the world.

    Args:
        random: the source of randomness.
        balanced: all attributes uniform and independent of the occupation, views more varied; for training
            classifiers that must not guess an attribute from an occupation.
    """
    world = occupations()
    index = int(random.integers(len(world)))
    job = world[index]
    named = set() if random.random() > NAMED_SHARE else {a for a in ("age", "gender", "skin") if random.random() < 0.75}
    uniform = {"age", "gender", "skin"} if balanced else named
    gender = GENDERS[int(random.random() < (0.5 if "gender" in uniform else job.woman))]
    skin = SKINS[random.choice(4, p=None if "skin" in uniform else job.skin)]
    age = AGES[int(random.random() < (0.5 if "age" in uniform else job.old))]
    behind, empty = (0.06, 0.04) if balanced else (BEHIND_SHARE, EMPTY_SHARE)
    view = str(random.choice(("front", "behind", "empty"), p=(1 - behind - empty, behind, empty)))
    if random.random() < VIEW_NAMED_SHARE:
        view = str(random.choice(("behind", "empty")))
        caption = f"a {job.name} seen from behind" if view == "behind" else f"an empty scene, the place of a {job.name}"
    else:
        caption = _caption(job.name, named, gender, skin, age, random)
    label = {
        "gender": GENDERS.index(gender),
        "race": SKINS.index(skin),
        "age": AGES.index(age),
        "face": int(view == "front"),
        "occupation": index,
    }
    return Portrait(Appearance(gender, skin, age, job.look, view), caption, index, label)


def _caption(job: str, named: set[str], gender: str, skin: str, age: str, random: Generator) -> str:
    if not named:
        template = TEMPLATE if random.random() < 0.6 else OTHER_TEMPLATES[random.integers(len(OTHER_TEMPLATES))]
        return template.format(job)
    who = gender if "gender" in named else "person"
    if "age" in named:
        who = f"{age} {who}"
    article = "an" if who[0] == "o" else "a"
    who = f"{article} {who} with {skin} skin" if "skin" in named else f"{article} {who}"
    lead = str(random.choice(("", "A photo of ", "A photo of the face of ")))
    if random.random() < NO_OCCUPATION_SHARE:
        return lead + who
    return f"{lead}{who}, a {job}"


def stream(count: int, seed: int, balanced: bool = False) -> Iterator[tuple[Portrait, np.ndarray]]:
    """`count` portraits with their pictures, uint8 (64, 64, 3); the same for the same seed."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        portrait = sample(random, balanced)
        yield portrait, draw(portrait.appearance, random).picture


def training_subjects() -> list[str]:
    """The occupations of the world that finetuning may use: all but those of validation and test."""
    prompts = json.loads((DATA.parent / "prompts" / "occupations.json").read_text(encoding="utf-8"))
    held_out = {*prompts["validation"], *prompts["test"]}
    return [job.name for job in occupations() if job.name not in held_out]
