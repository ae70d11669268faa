"""What an audit warns of: attributes that nobody reads, few images, truncated prompts."""

import sys
from collections.abc import Mapping, Sequence
from textwrap import shorten

from fairness_dft.audits.audit import Audit
from fairness_dft.metrics.bias import finite_sample_floor
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.results import Results
from fairness_dft.training.bias_monitor import BiasMonitor

ENOUGH = 24  # images of a prompt for each class; a fair model scores about a tenth of the largest bias then


def refuse_no_faces(results: Results) -> None:
    """Say that nothing can be said of pictures without faces.

    Raises:
        ValueError: if no judge sees one.
    """
    found = (result for seen in results.bias.values() for result in seen.values())
    sides = [side for result in found for side in result.models.values()]
    if not any(sum(map(sum, side.counts)) for side in sides):
        raise ValueError(
            "no image shows a face, as the detectors see it: nothing can be said of whom they show; give pictures of "
            "people, best 24 a prompt for each class, or another --model.judge.faces"
        )


def warn_of_what_is_not_read(module: Audit, bias: BiasMonitor) -> None:
    """Tell which attributes no classifier reads, and which classifiers name other classes than the training one."""
    judges = {"training": module.judge, **bias.others}
    for name in bias.attributes:
        if not any(judge.reads(name) for judge in judges.values()):
            print(f"warning: no classifier reads {name}: nothing is told of it", file=sys.stderr)
    for name in module.attribute.names:
        known = set(module.judge.classes(name))
        for judge, other in bias.others.items():
            if other.reads(name) and set(other.classes(name)) != known:
                own, others = ", ".join(sorted(known)), ", ".join(other.classes(name))
                print(
                    f"warning: the classifier {judge!r} has other classes of {name} ({others}) than the training one "
                    f"({own}): it is compared with neither it nor the target",
                    file=sys.stderr,
                )


def warn_of_few_images(images: int, module: Audit) -> None:
    """Tell who looks at few images of a prompt how little they can say, and how many say more."""
    name = module.attribute.label
    classes = len(module.judge.classes(name))
    floor, more = (float(finite_sample_floor(count, classes)) for count in (images, ENOUGH * classes))
    if images < ENOUGH * classes:
        print(
            f"warning: of {images} images a prompt, a perfectly fair model would score {floor:.2f} of at most "
            f"{2 / classes:.2f} for the {classes} classes of {name} by chance; {ENOUGH * classes} images bring that "
            f"to {more:.2f}",
            file=sys.stderr,
        )


def truncated_text(module: Audit, prompts: Sequence[Prompt]) -> dict[str, str]:
    """By prompt, the end of it that the text encoder does not read; of the prompts that are too long for it."""
    return {prompt.text: cut for prompt in prompts if (cut := module.generator.truncated_text(prompt.text))}


def warn_of_long_prompts(cut: Mapping[str, str]) -> None:
    """Tell of prompts whose end the text encoder does not read."""
    few = [[shorten(part, 60, placeholder="…") for part in pair] for pair in list(cut.items())[:3]]
    told = "; ".join(f"{end!r} of {text!r}" for text, end in few)
    if cut:
        more = "; and so on, as results.json tells" if len(cut) > 3 else ""
        print(f"warning: the text encoder does not read the end of a prompt: {told}{more}", file=sys.stderr)
