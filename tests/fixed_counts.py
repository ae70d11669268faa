"""A small audit by fixed counts: two classifiers, two models, a product, named attributes, an own target, pairs."""

import torch

from fairness_dft.metrics.bias import summarize_bias
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.build import Measured, build_results
from fairness_dft.reports.results import Results

CLASSES = {
    "gender": ("man", "woman"),
    "age": ("young", "old"),
    "gender×age": ("man, young", "man, old", "woman, young", "woman, old"),
}
PROMPTS = [
    Prompt("a chef", "chef", "work"),
    Prompt("a judge", "judge", "work"),
    Prompt("polo", "polo", "sport"),
    Prompt("an old nurse", "nurse", "work", (("age", "old"),)),
]
TARGET = {
    "gender×age": {"man, young": 0.375, "man, old": 0.125, "woman, young": 0.375, "woman, old": 0.125},
    "gender": {"man": 0.5, "woman": 0.5},
    "age": {"young": 0.75, "old": 0.25},
}
OWN_TARGETS = {
    "polo": {
        "gender×age": {"man, young": 0.2, "man, old": 0.2, "woman, young": 0.3, "woman, old": 0.3},
        "gender": {"man": 0.4, "woman": 0.6},
        "age": {"young": 0.5, "old": 0.5},
    }
}
# Images by prompt and joint class; the rest of 12 shows no face.
JOINT = {
    ("training", "original"): [[7, 3, 1, 0], [0, 1, 4, 7], [12, 0, 0, 0], [0, 9, 0, 3]],
    ("training", "ema"): [[4, 2, 4, 2], [2, 1, 5, 4], [6, 1, 4, 1], [1, 5, 0, 6]],
    ("independent", "original"): [[6, 4, 1, 1], [1, 1, 4, 6], [11, 1, 0, 0], [0, 8, 1, 2]],
    ("independent", "ema"): [[5, 2, 3, 1], [1, 2, 5, 4], [7, 1, 3, 1], [1, 6, 0, 5]],
}
PAIRS = [  # of gender by the training classifier, before by after; the last is no face
    [[5, 5, 0], [1, 0, 0], [0, 1, 0]],
    [[1, 0, 0], [2, 9, 0], [0, 0, 0]],
    [[7, 5, 0], [0, 0, 0], [0, 0, 0]],
    [[6, 3, 0], [0, 3, 0], [0, 0, 0]],
]


def measured() -> Measured:
    """What monitors would have seen."""
    summaries = {}
    for name, classes in CLASSES.items():
        for (judge, model), table in JOINT.items():
            joint = torch.tensor(table)
            cells = joint.reshape(len(joint), 2, 2)
            counts = {"gender": cells.sum(2), "age": cells.sum(1), "gender×age": joint}[name]
            summaries[judge, name, model] = summarize_bias(counts, 12 - joint.sum(1), classes)
    ordered = {key: summaries[key] for key in sorted(summaries, key=lambda key: key[0] != "training")}
    return Measured(
        ordered,
        kept={("clip_t", "original"): 0.31, ("clip_t", "ema"): 0.3, ("dino", "ema"): float("nan")},
        agreement={
            ("training", "independent", "gender", model): share for model, share in (("original", 0.9), ("ema", 0.8))
        },
        pairs={("training", "gender"): torch.tensor(PAIRS)},
    )


def fixed_results() -> Results:
    """Return the results of these counts."""
    return build_results(["gender", "age"], TARGET, PROMPTS, measured(), own_targets=OWN_TARGETS)
