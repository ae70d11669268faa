"""Bias and class frequencies in validation and test, by the training classifier and by independent ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torchmetrics import MeanMetric
from typing_extensions import override

from fairness_dft.attributes import TIMES, Attribute
from fairness_dft.classifiers.judge import Judge, Verdict
from fairness_dft.metrics.bias import BiasSummary, Watched
from fairness_dft.metrics.fairness_metric import FairnessMetric, PairMetric
from fairness_dft.metrics.image_readings import ImageReadings, Readings
from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.csv_tables import ImageTable, image_table
from fairness_dft.training.evaluation import Evaluation
from fairness_dft.training.evaluation_callback import EvaluationCallback

TRAINING, INDEPENDENT = "training", "independent"


class BiasMonitor(EvaluationCallback):
    """Measures bias and class frequencies of each model, by the training classifier and by independent ones.

    Args:
        attributes: Attributes, or products such as gender×race, to watch in addition to the aligned ones. A classifier
            that does not read one leaves it out.
        independent_judge: A face finder and classifier that training never uses.
        other_judges: More of them, by name.
        every_face: Count every face of an image instead of the largest one. Images in the figures are then faces, or
            images without a face, and the agreement of classifiers is not measured.

    Attributes:
        summaries: After an evaluation, a `BiasSummary` for each (classifier, attribute, model).
        agreement: After a test, for each (classifier, other classifier, attribute, model) the share of equal classes
            among the images in which both see a face.
        pairs: After a test of two models, for each (classifier, attribute) the classes of the images of each noise by
            the original and the EMA model, as `PairMetric` counts them.
        readings: After a test, for each (classifier, model) what it reads in each image, of single attributes.
    """

    def __init__(
        self,
        attributes: tuple[str, ...] = ("gender", "race", "age", "gender×race"),
        independent_judge: Judge | None = None,
        other_judges: dict[str, Judge] | None = None,
        every_face: bool = False,
    ) -> None:
        if taken := {TRAINING, INDEPENDENT} & (other_judges or {}).keys():
            raise ValueError(f"`other_judges` must have names of their own, but got {taken.pop()!r}")
        self.attributes, self.every_face = attributes, every_face
        self.others = {INDEPENDENT: independent_judge} if independent_judge else {}
        self.others |= other_judges or {}
        self.metrics: dict[Watched, FairnessMetric] = {}
        self.summaries: dict[Watched, BiasSummary] = {}
        self.same: dict[tuple[str, str, str, str], MeanMetric] = {}
        self.agreement: dict[tuple[str, str, str, str], float] = {}
        self.paired: dict[tuple[str, str], PairMetric] = {}
        self.pairs: dict[tuple[str, str], Tensor] = {}
        self.images: dict[tuple[str, str], ImageReadings] = {}
        self.tested = False
        self.readings: dict[tuple[str, str], Readings] = {}

    def load(self) -> None:
        """Load the classifiers that training does not use, once."""
        for judge in self.others.values():
            judge.load()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.load()

    def judges(self, module: Evaluation) -> Iterator[tuple[str, Judge]]:
        """Yield the classifiers with their names, that of the training first."""
        yield TRAINING, module.judge
        for name, judge in self.others.items():
            yield name, judge.to(module.device)

    def read_by(self, judge: Judge, aligned: Attribute) -> list[str]:
        """Return the watched attributes that a classifier reads, the aligned ones first."""
        watched = dict.fromkeys((aligned.label, *aligned.names, *self.attributes))
        return [name for name in watched if judge.reads(name)]

    @override
    def start(self, trainer: Trainer, module: Evaluation, stage: str) -> None:
        self.metrics, self.same, self.paired, self.images = {}, {}, {}, {}
        self.tested = stage == "test"
        loader: Any = trainer.val_dataloaders if stage == "validation" else trainer.test_dataloaders
        self.count = getattr(loader, "prompt_count", len(loader))  # prompts of an image folder have several batches

    @override
    @torch.no_grad()
    def see(self, module: Evaluation, images: dict[str, Tensor], batch: PromptBatch) -> None:
        read: dict[str, dict[str, Verdict]] = {}
        for model, pictures in images.items():
            verdicts = {
                name: (judge, judge.every(pictures) if self.every_face else judge(pictures))
                for name, judge in self.judges(module)
            }
            read[model] = {name: verdict for name, (_, verdict) in verdicts.items()}
            for name, (judge, verdict) in verdicts.items():
                for attribute in self.read_by(judge, module.attribute):
                    metric = self.metric((name, attribute, model), judge).to(module.device)
                    metric.update(batch.index, verdict.classes(attribute), verdict.has_face)
                if self.tested:
                    self.keep((name, model), verdict, self.single(judge, module.attribute), batch)
            for name, other in () if self.every_face else combinations(verdicts, 2):
                for attribute in self.read_by(verdicts[name][0], module.attribute):
                    if (same := read_alike(attribute, *verdicts[name], *verdicts[other])) is not None:
                        key = name, other, attribute, model
                        mean = self.same.setdefault(key, MeanMetric(nan_strategy="ignore")).to(module.device)
                        mean.update(same.float())

        if not self.every_face and {"original", "ema"} <= read.keys():
            self.pair(module, batch.index, read["original"], read["ema"])

    def pair(self, module: Evaluation, index: int, before: Mapping[str, Verdict], after: Mapping[str, Verdict]) -> None:
        """Count the classes of the images of one prompt by the original and the EMA model, for each classifier."""
        for name, judge in self.judges(module):
            for attribute in self.read_by(judge, module.attribute):
                key = name, attribute
                if key not in self.paired:
                    self.paired[key] = PairMetric(len(judge.classes(attribute)), self.count)
                sides = (of for side in (before[name], after[name]) for of in (side.classes(attribute), side.has_face))
                self.paired[key].to(module.device).update(index, *sides)

    def watch_named(self, prompts: Sequence[Prompt]) -> None:
        """Also watch the attributes that prompts name."""
        named = [attribute for prompt in prompts for attribute, _ in prompt.names]
        self.attributes = tuple(dict.fromkeys((*self.attributes, *named)))

    def single(self, judge: Judge, aligned: Attribute) -> dict[str, tuple[str, ...]]:
        """Return the classes of the watched attributes that a classifier reads, without products."""
        return {name: judge.classes(name) for name in self.read_by(judge, aligned) if TIMES not in name}

    def keep(
        self, key: tuple[str, str], verdict: Verdict, classes: Mapping[str, Sequence[str]], batch: PromptBatch
    ) -> None:
        """Keep what a classifier reads in each image of one prompt, for the table of images."""
        if key not in self.images:
            self.images[key] = ImageReadings({name: len(labels) for name, labels in classes.items()})
        seeds = batch.seeds if verdict.owners is None else batch.seeds[verdict.owners]
        probabilities = {name: verdict.probabilities(name) for name in classes}
        metric = self.images[key].to(verdict.boxes.device)
        metric.update(batch.index, seeds.to(verdict.boxes.device), verdict.has_face, verdict.boxes, probabilities)

    def image_table(
        self, module: Evaluation, prompts: Sequence[Prompt], file: Callable[[str, int, int], str] | None = None
    ) -> ImageTable:
        """Return what every classifier reads in each image of a test; see `reports.csv_tables.image_table`."""
        classes = {name: self.single(judge, module.attribute) for name, judge in self.judges(module)}
        return image_table(prompts, self.readings, classes, file)

    def check_names(self, prompts: Sequence[Prompt], training_judge: Judge) -> None:
        """Refuse prompts that name a class which a classifier does not know.

        Args:
            prompts: The prompts.
            training_judge: The classifier that training learns from; loaded, like those of this monitor.

        Raises:
            ValueError: If a prompt does.
        """
        for judge in (training_judge, *self.others.values()):
            for prompt in prompts:
                refuse_unknown_names(prompt, judge)

    def metric(self, key: Watched, judge: Judge) -> FairnessMetric:
        """Return the metric of a (classifier, attribute, model), created on first use."""
        if key not in self.metrics:
            self.metrics[key] = FairnessMetric(judge.classes(key[1]), self.count)
        return self.metrics[key]

    @override
    def finish(self, trainer: Trainer, module: Evaluation, stage: str) -> None:
        self.summaries = {key: metric.compute() for key, metric in self.metrics.items()}
        if stage == "test":
            self.agreement = {key: float(metric.compute()) for key, metric in self.same.items()}
            self.pairs = {key: metric.compute().cpu() for key, metric in self.paired.items()}
            self.readings = {key: metric.readings() for key, metric in self.images.items()}
        prefix = "" if stage == "validation" else "test_"
        for attribute, shares in module.targets.shares().items():
            for name, share in shares.items():
                module.log(f"{prefix}frequency_{attribute.replace(TIMES, '_')}/{name}_target", share, sync_dist=True)
        for (judge, attribute, model), summary in self.summaries.items():
            tag = attribute.replace(TIMES, "_")
            group = f"{prefix}bias_{tag}"
            if judge == TRAINING:
                aligned = attribute == module.attribute.label and model == "ema" and stage == "validation"
                module.log(f"{group}/{model}", summary.bias, prog_bar=aligned, sync_dist=True)
                module.log(f"{group}/floor", summary.floor, sync_dist=True)
                for name, share in zip(summary.classes, summary.frequencies, strict=True):
                    module.log(f"{prefix}frequency_{tag}/{name}_{model}", share, sync_dist=True)
                without = summary.no_face_images / max(summary.images, 1)
                module.log(f"{prefix}faces/without_face_{model}", without, sync_dist=True)
            else:
                module.log(f"{group}/{model}_{judge}", summary.bias, sync_dist=True)


def refuse_unknown_names(prompt: Prompt, judge: Judge) -> None:
    """Refuse a prompt that names a class which a classifier that reads the attribute does not know.

    Raises:
        ValueError: If it does.
    """
    for attribute, named in prompt.names:
        if named is not None and judge.reads(attribute) and named not in judge.classes(attribute):
            raise ValueError(
                f"the prompt {prompt.text!r} names {attribute} {named!r}, but a classifier knows only "
                f"{', '.join(judge.classes(attribute))}; take other prompts, or another name in their file"
            )


def read_alike(attribute: str, judge: Judge, verdict: Verdict, other: Judge, another: Verdict) -> Tensor | None:
    """Return whether two classifiers predict the same class, for the images in which both see a face.

    Returns:
        A boolean tensor with shape (n,); None if one does not read the attribute, or has other classes.
    """
    if not (judge.reads(attribute) and other.reads(attribute)):
        return None
    classes, others = judge.classes(attribute), other.classes(attribute)
    if set(classes) != set(others):
        return None
    place = torch.tensor([classes.index(name) for name in others], device=verdict.has_face.device)
    both = verdict.has_face & another.has_face
    return (verdict.classes(attribute) == place[another.classes(attribute)])[both]
