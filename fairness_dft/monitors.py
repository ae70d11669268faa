"""What measures a run in validation and test: bias, quality, pictures.

Every monitor is handed the same images, those of the original, the trained and the averaged (EMA) model from the same
prompts and noise; each has one concern.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from fairness_dft.attributes import TIMES, Attribute
from fairness_dft.classifiers import Judge, Verdict
from fairness_dft.features import Clip
from fairness_dft.fidelity import Fidelity, Inception
from fairness_dft.metrics import BiasSummary, FairnessMetric, PairMetric, Watched
from fairness_dft.module import FairFinetuning
from fairness_dft.prompt_files import Prompt
from fairness_dft.prompts import PromptBatch
from fairness_dft.report import GridRow, GridSide, comparison_grid
from fairness_dft.results import Measured, results

TRAINING, INDEPENDENT = "training", "independent"


class EvaluationCallback(Callback):
    """A callback that does the same in validation and in test."""

    def start(self, trainer: Trainer, module: FairFinetuning, stage: str) -> None:
        """Before the first batch; stage is "validation" or "test"."""

    def see(self, module: FairFinetuning, images: dict[str, Tensor], batch: PromptBatch) -> None:
        """Images of each model, with shape (N, 3, H, W), in [0, 1], from the batch's prompt and noise."""

    def finish(self, trainer: Trainer, module: FairFinetuning, stage: str) -> None:
        """After the last batch."""

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start(trainer, pl_module, "validation")

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.see(pl_module, outputs, batch)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(trainer, pl_module, "validation")

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start(trainer, pl_module, "test")

    @override
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.see(pl_module, outputs, batch)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(trainer, pl_module, "test")


class BiasMonitor(EvaluationCallback):
    """Bias and class frequencies of each model, by the training judge and by one that training never saw.

    Args:
        attributes: which attributes, or products such as gender×race, are watched besides the aligned ones; those
            that a judge does not read are left out.
        independent_judge: a face finder and classifier trained apart from those that training learns from.
        other_judges: further ones, by name.
        every_face: count each of several faces in an image, instead of the largest. What the figures call images are
            then faces, and images without any; how far judges agree is not told.

    Attributes:
        summaries: after an evaluation, a `BiasSummary` for each (judge, attribute, model).
        agreement: after a test, for each (judge, other judge, attribute, model) the share of the images on which both
            see a face that they read alike.
        pairs: after a test of two models, for each (judge, attribute) how the images of each noise are read before and
            after, as `PairMetric` counts them.
    """

    def __init__(
        self,
        attributes: tuple[str, ...] = ("gender", "race", "age", "gender×race"),
        independent_judge: Judge | None = None,
        other_judges: dict[str, Judge] | None = None,
        every_face: bool = False,
    ) -> None:
        if odd := {TRAINING, INDEPENDENT} & (other_judges or {}).keys():
            raise ValueError(f"`other_judges` must have names of their own, but got {odd.pop()!r}")
        self.attributes, self.every_face = attributes, every_face
        self.others = {INDEPENDENT: independent_judge} if independent_judge else {}
        self.others |= other_judges or {}
        self.metrics: dict[Watched, FairnessMetric] = {}
        self.summaries: dict[Watched, BiasSummary] = {}
        self.same: dict[tuple[str, str, str, str], MeanMetric] = {}
        self.agreement: dict[tuple[str, str, str, str], float] = {}
        self.paired: dict[tuple[str, str], PairMetric] = {}
        self.pairs: dict[tuple[str, str], Tensor] = {}

    def load(self) -> None:
        """Load the judges that training does not learn from, once."""
        for judge in self.others.values():
            judge.load()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.load()

    def judges(self, module: FairFinetuning) -> Iterator[tuple[str, Judge]]:
        """The judges by name, the training judge first."""
        yield TRAINING, module.judge
        for name, judge in self.others.items():
            yield name, judge.to(module.device)

    def read_by(self, judge: Judge, aligned: Attribute) -> list[str]:
        """The watched attributes that a judge reads, the aligned ones first."""
        watched = dict.fromkeys((aligned.label, *aligned.names, *self.attributes))
        return [name for name in watched if judge.reads(name)]

    @override
    def start(self, trainer: Trainer, module: FairFinetuning, stage: str) -> None:
        self.metrics, self.same, self.paired = {}, {}, {}
        loader = trainer.val_dataloaders if stage == "validation" else trainer.test_dataloaders
        self.count = getattr(loader, "prompt_count", len(loader))  # a folder's prompts may come in several batches

    @override
    @torch.no_grad()
    def see(self, module: FairFinetuning, images: dict[str, Tensor], batch: PromptBatch) -> None:
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
                    metric.update(batch.index, verdict.classes(attribute), verdict.face)
            for name, other in () if self.every_face else combinations(verdicts, 2):
                for attribute in self.read_by(verdicts[name][0], module.attribute):
                    if (same := read_alike(attribute, *verdicts[name], *verdicts[other])) is not None:
                        key = name, other, attribute, model
                        mean = self.same.setdefault(key, MeanMetric(nan_strategy="ignore")).to(module.device)
                        mean.update(same.float())

        if not self.every_face and {"original", "ema"} <= read.keys():
            self.pair(module, batch.index, read["original"], read["ema"])

    def pair(
        self, module: FairFinetuning, index: int, before: Mapping[str, Verdict], after: Mapping[str, Verdict]
    ) -> None:
        """Count how each judge reads the images of one prompt before and after."""
        for name, judge in self.judges(module):
            for attribute in self.read_by(judge, module.attribute):
                key = name, attribute
                if key not in self.paired:
                    self.paired[key] = PairMetric(len(judge.classes(attribute)), self.count)
                sides = (of for side in (before[name], after[name]) for of in (side.classes(attribute), side.face))
                self.paired[key].to(module.device).update(index, *sides)

    def check_names(self, prompts: Sequence[Prompt], training_judge: Judge) -> None:
        """Refuse prompts that name what a judge does not know, and watch what they name.

        Raises:
            ValueError: if there is one.
        """
        if not any(prompt.names for prompt in prompts):
            return
        named = dict.fromkeys(attribute for prompt in prompts for attribute, _ in prompt.names)
        self.attributes = tuple(dict.fromkeys((*self.attributes, *named)))
        training_judge.load()
        for judge in (training_judge, *self.others.values()):
            for prompt in prompts:
                refuse_unknown_names(prompt, judge)

    def metric(self, key: Watched, judge: Judge) -> FairnessMetric:
        """The metric of a (judge, attribute, model), made on first use."""
        if key not in self.metrics:
            self.metrics[key] = FairnessMetric(judge.classes(key[1]), self.count)
        return self.metrics[key]

    @override
    def finish(self, trainer: Trainer, module: FairFinetuning, stage: str) -> None:
        self.summaries = {key: metric.compute() for key, metric in self.metrics.items()}
        if stage == "test":
            self.agreement = {key: float(metric.compute()) for key, metric in self.same.items()}
            self.pairs = {key: metric.compute().cpu() for key, metric in self.paired.items()}
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
                without = summary.without_face / max(summary.images, 1)
                module.log(f"{prefix}faces/without_face_{model}", without, sync_dist=True)
            else:
                module.log(f"{group}/{model}_{judge}", summary.bias, sync_dist=True)


def refuse_unknown_names(prompt: Prompt, judge: Judge) -> None:
    """Refuse a prompt that names a class which a judge that reads the attribute does not know.

    Raises:
        ValueError: if it does.
    """
    for attribute, kind in prompt.names:
        if kind is not None and judge.reads(attribute) and kind not in judge.classes(attribute):
            raise ValueError(
                f"the prompt {prompt.text!r} names {attribute} {kind!r}, but a classifier knows only "
                f"{', '.join(judge.classes(attribute))}; take other prompts, or another name in their file"
            )


def read_alike(attribute: str, judge: Judge, verdict: Verdict, other: Judge, another: Verdict) -> Tensor | None:
    """Whether two judges read the same class, for the images on which both see a face.

    Returns:
        bool with shape (n,); None if one does not read the attribute, or has other classes.
    """
    if not (judge.reads(attribute) and other.reads(attribute)):
        return None
    classes, others = judge.classes(attribute), other.classes(attribute)
    if set(classes) != set(others):
        return None
    place = torch.tensor([classes.index(name) for name in others], device=verdict.face.device)
    both = verdict.face & another.face
    return (verdict.classes(attribute) == place[another.classes(attribute)])[both]


class QualityMonitor(EvaluationCallback):
    """How much of the image was kept: CLIP-T, similarity to the original image, and the subject.

    CLIP-T is the cosine of image and prompt; the module's feature networks give the cosine of each image with the
    original model's from the same noise (CLIP-I, DINO), and in a test the distances between the two models' pictures as
    sets (`Fidelity`). Where a judge also reads the subject of the prompt, such as
    the occupation, the share of images in which it reads the same as in the original is reported, of all images: one
    that lost its face counts by what is read in it all the same.

    Args:
        judge: a judge that training never saw, with a head for the subject; none skips the last measure.
        subject: name of that head.
        inception: weights of `fidelity.Inception`, for the distances of published figures too; none leaves them out.

    Attributes:
        values: after an evaluation, the mean of each measure by (measure, model).
    """

    def __init__(self, judge: Judge | None = None, subject: str = "subject", inception: str | None = None) -> None:
        self.judge, self.subject = judge, subject
        self.inception = None if inception is None else Inception(inception)
        self.metrics: dict[tuple[str, str], MeanMetric] = {}
        self.sets: dict[tuple[str, str], Fidelity] = {}
        self.tested = False
        self.values: dict[tuple[str, str], float] = {}

    def load(self) -> None:
        """Load the judge, once.

        Raises:
            ValueError: if it does not read the subject, or Inception cannot be loaded.
        """
        if self.judge is not None:
            self.judge.load()
            self.judge.classes(self.subject)
        if self.inception is not None:
            self.inception.load()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.load()

    @override
    def start(self, trainer: Trainer, module: FairFinetuning, stage: str) -> None:
        self.metrics, self.sets = {}, {}
        self.tested = stage != "validation"

    @override
    @torch.no_grad()
    def see(self, module: FairFinetuning, images: dict[str, Tensor], batch: PromptBatch) -> None:
        for name, network in by_name(module.features).items():
            embeddings = {model: network(pictures) for model, pictures in images.items()}
            for model, embedding in embeddings.items():
                if isinstance(network, Clip):
                    text = network.embed_text([batch.prompt.text])
                    self.update(module, (f"{name}_t", model), (embedding * text).sum(-1))
                if model != "original":
                    measure = f"{name}_i" if isinstance(network, Clip) else name
                    self.update(module, (measure, model), (embedding * embeddings["original"]).sum(-1))
                    if self.tested:
                        self.moved(module, (name, model), embeddings["original"], embedding)
        if self.inception is not None and self.tested:
            inception = self.inception.to(module.device)
            embeddings = {model: inception(pictures) for model, pictures in images.items()}
            original = embeddings.pop("original")
            for model, embedding in embeddings.items():
                self.moved(module, ("inception", model), original, embedding, scale=1.0)
        if self.judge is not None:
            judge = self.judge.to(module.device)
            read = {model: judge(pictures) for model, pictures in images.items()}
            original = read.pop("original")
            for model, verdict in read.items():
                same = verdict.classes(self.subject) == original.classes(self.subject)
                self.update(module, (f"{self.subject}_kept", model), same.float())

    def moved(
        self, module: FairFinetuning, key: tuple[str, str], before: Tensor, after: Tensor, scale: float | None = None
    ) -> None:
        """Add embeddings to the distances of a (network, model), made on first use."""
        distances = self.sets.setdefault(key, Fidelity(before.shape[1], scale)).to(module.device)
        distances.update(before, after)

    def update(self, module: FairFinetuning, key: tuple[str, str], values: Tensor) -> None:
        """Add values to the mean of a (measure, model), made on first use."""
        metric = self.metrics.setdefault(key, MeanMetric(nan_strategy="ignore")).to(module.device)
        metric.update(values)

    @override
    def finish(self, trainer: Trainer, module: FairFinetuning, stage: str) -> None:
        self.values = {key: float(metric.compute()) for key, metric in self.metrics.items()}
        for (network, model), moved in self.sets.items():
            for distance, value in (moved.compute() or {}).items():
                self.values[f"{distance}_{network}", model] = value
        prefix = "" if stage == "validation" else "test_"
        for (measure, model), value in self.values.items():
            module.log(f"{prefix}kept/{measure}_{model}", value, sync_dist=True)


def by_name(networks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Networks by the name of their class; the second of a class is `clip_2`."""
    named: dict[str, nn.Module] = {}
    for network in networks:
        name = type(network).__name__.lower()
        place = 1 + sum(type(other) is type(network) for other in named.values())
        named[name if place == 1 else f"{name}_{place}"] = network
    return named


def results_of_test(module: FairFinetuning, prompts: Sequence[Prompt], run: dict[str, object]) -> dict[str, Any]:
    """What results.json says of the test that just ran.

    Args:
        module: what was tested, by a trainer with both monitors.
        prompts: of the test, in their order.
        run: facts of the run.
    """
    found = {type(callback): callback for callback in module.trainer.callbacks}
    bias, quality = found[BiasMonitor], found[QualityMonitor]
    measured = Measured(bias.summaries, quality.values, bias.agreement, bias.pairs)
    own = module.targets.own_shares(prompts)
    return results(module.attribute.names, module.targets.shares(), prompts, measured, run, own)


class ImageGrid(EvaluationCallback):
    """Pictures of the same prompts from the same noise, before and after, in TensorBoard and as a file.

    Args:
        prompts: how many prompts, one a row.
        images: how many images of each model in a row.

    Attributes:
        file: the picture that the test wrote.
    """

    def __init__(self, prompts: int = 6, images: int = 12) -> None:
        self.prompts, self.images = prompts, images
        self.rows: list[GridRow] = []
        self.file: Path | None = None

    @override
    def start(self, trainer: Trainer, module: FairFinetuning, stage: str) -> None:
        self.rows = []

    @override
    @torch.no_grad()
    def see(self, module: FairFinetuning, images: dict[str, Tensor], batch: PromptBatch) -> None:
        if len(self.rows) >= self.prompts or not module.trainer.is_global_zero:
            return
        row = GridRow(batch.prompt.text)
        for model in [model for model in ("original", "ema") if model in images]:
            pictures = images[model][: self.images]
            verdict = module.judge(pictures)
            classes = [verdict.classes(name).cpu() for name in module.attribute.names]
            row.sides[model] = GridSide(pictures.float().cpu(), torch.stack(classes, 1), verdict.face.cpu())
        self.rows.append(row)

    @override
    def finish(self, trainer: Trainer, module: FairFinetuning, stage: str) -> None:
        log_dir = trainer.log_dir  # a broadcast: every rank must ask
        if not trainer.is_global_zero or not self.rows:
            return
        grid = comparison_grid(self.rows, {name: module.judge.classes(name) for name in module.attribute.names})
        if log_dir is not None and stage == "test":
            self.file = Path(log_dir, "before_after.png")
            self.file.parent.mkdir(parents=True, exist_ok=True)
            grid.save(self.file)
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_image"):
                import numpy as np

                logger.experiment.add_image(
                    f"before_after/{stage}", np.asarray(grid), trainer.global_step, dataformats="HWC"
                )
