"""Warnings of an audit: attributes that no classifier reads, few images, truncated prompts."""

import sys
from collections.abc import Mapping, Sequence
from textwrap import shorten

from fairness_dft.audits.audit import Audit
from fairness_dft.metrics.bias import finite_sample_floor
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.results import Results
from fairness_dft.training.bias_monitor import BiasMonitor

ENOUGH = 24  # images per prompt and class, with which a fair model scores about a tenth of the largest bias


def refuse_no_faces(results: Results) -> None:
    """Refuse images without any face.

    Raises:
        ValueError: If no classifier finds a face.
    """
    attributes = (attribute for classifier in results.bias.values() for attribute in classifier.values())
    sides = [side for attribute in attributes for side in attribute.models.values()]
    if not any(sum(map(sum, side.counts)) for side in sides):
        raise ValueError(
            "no face was detected in any image, so no bias can be measured; give images of people, at best 24 per "
            "prompt and class, or another --model.judge.faces"
        )


def warn_of_what_is_not_read(module: Audit, bias: BiasMonitor) -> None:
    """Warn of attributes that no classifier reads, and of classifiers with other classes than the training one."""
    judges = {"training": module.judge, **bias.others}
    for name in bias.attributes:
        if not any(judge.reads(name) for judge in judges.values()):
            print(f"warning: no classifier reads {name}, so it is left out", file=sys.stderr)
    for name in module.attribute.names:
        known = set(module.judge.classes(name))
        for judge, other in bias.others.items():
            if other.reads(name) and set(other.classes(name)) != known:
                own, others = ", ".join(sorted(known)), ", ".join(other.classes(name))
                print(
                    f"warning: the classifier {judge!r} has other classes of {name} ({others}) than the training one "
                    f"({own}), so it is not compared with that one or with the target",
                    file=sys.stderr,
                )


def warn_of_few_images(images: int, module: Audit) -> None:
    """Warn of few images per prompt: how much a fair model scores by chance, and how many images reduce it."""
    name = module.attribute.label
    classes = len(module.judge.classes(name))
    floor, more = (float(finite_sample_floor(count, classes)) for count in (images, ENOUGH * classes))
    if images < ENOUGH * classes:
        print(
            f"warning: with {images} images per prompt, even a fair model scores about {floor:.2f} for the {classes} "
            f"classes of {name} (maximum {2 / classes:.2f}); use {ENOUGH * classes} or more to reduce this to "
            f"{more:.2f}",
            file=sys.stderr,
        )


def truncated_text(module: Audit, prompts: Sequence[Prompt]) -> dict[str, str]:
    """Return the end of each prompt that is too long for the text encoder, which it does not read, by prompt."""
    return {prompt.text: cut for prompt in prompts if (cut := module.generator.truncated_text(prompt.text))}


def warn_of_long_prompts(cut: Mapping[str, str]) -> None:
    """Warn of prompts whose end the text encoder does not read."""
    few = [[shorten(part, 60, placeholder="…") for part in pair] for pair in list(cut.items())[:3]]
    examples = "; ".join(f"{end!r} of {text!r}" for text, end in few)
    if cut:
        more = "; results.json lists all of them" if len(cut) > 3 else ""
        print(f"warning: the text encoder does not read the end of a prompt: {examples}{more}", file=sys.stderr)
