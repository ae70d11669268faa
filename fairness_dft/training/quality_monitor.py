"""What finetuning keeps of the images: CLIP-T, CLIP-I, DINO, FID and KID (paper, section 5)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from fairness_dft.classifiers.judge import Judge
from fairness_dft.features import Clip
from fairness_dft.metrics.fidelity import Fidelity, Inception
from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.build import Measured, build_results
from fairness_dft.reports.results import Results, RunFacts
from fairness_dft.training.bias_monitor import BiasMonitor
from fairness_dft.training.evaluation import Evaluation
from fairness_dft.training.evaluation_callback import EvaluationCallback, callbacks_of


class QualityMonitor(EvaluationCallback):
    """Measures what is kept of the image: CLIP-T, similarity to the original image, and the subject.

    CLIP-T is the cosine of image and prompt. The feature networks of the module give the cosine of each image with the
    original image from the same noise (CLIP-I, DINO), and in a test the distance between the two sets of images
    (`Fidelity`). A classifier that reads the subject of the prompt, such as the occupation, gives the share of images
    in which it reads the same subject as in the original image, among all images, with or without a face.

    Args:
        judge: A classifier that training never uses, with a head for the subject; None skips that measure.
        subject: Name of that head.
        inception: Weights of `fidelity.Inception`, for FID and KID as papers report them; None skips these measures.

    Attributes:
        values: After an evaluation, the mean of each measure by (measure, model).
    """

    def __init__(self, judge: Judge | None = None, subject: str = "subject", inception: str | None = None) -> None:
        self.judge, self.subject = judge, subject
        self.inception = None if inception is None else Inception(inception)
        self.metrics: dict[tuple[str, str], MeanMetric] = {}
        self.sets: dict[tuple[str, str], Fidelity] = {}
        self.tested = False
        self.values: dict[tuple[str, str], float] = {}

    def load(self) -> None:
        """Load the classifier and Inception, once.

        Raises:
            ValueError: If the classifier does not read the subject, or a network cannot be loaded.
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
    def start(self, trainer: Trainer, module: Evaluation, stage: str) -> None:
        self.metrics, self.sets = {}, {}
        self.tested = stage != "validation"

    @override
    @torch.no_grad()
    def see(self, module: Evaluation, images: dict[str, Tensor], batch: PromptBatch) -> None:
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
        self, module: Evaluation, key: tuple[str, str], before: Tensor, after: Tensor, scale: float | None = None
    ) -> None:
        """Add embeddings to the distances of a (network, model), which are created on first use."""
        distances = self.sets.setdefault(key, Fidelity(before.shape[1], scale)).to(module.device)
        distances.update(before, after)

    def update(self, module: Evaluation, key: tuple[str, str], values: Tensor) -> None:
        """Add values to the mean of a (measure, model), which is created on first use."""
        metric = self.metrics.setdefault(key, MeanMetric(nan_strategy="ignore")).to(module.device)
        metric.update(values)

    @override
    def finish(self, trainer: Trainer, module: Evaluation, stage: str) -> None:
        self.values = {key: float(metric.compute()) for key, metric in self.metrics.items()}
        for (network, model), moved in self.sets.items():
            for distance, value in (moved.compute() or {}).items():
                self.values[f"{distance}_{network}", model] = value
        prefix = "" if stage == "validation" else "test_"
        for (measure, model), value in self.values.items():
            module.log(f"{prefix}kept/{measure}_{model}", value, sync_dist=True)


def by_name(networks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Return networks by the name of their class; the second of a class is `clip_2`."""
    named: dict[str, nn.Module] = {}
    for network in networks:
        name = type(network).__name__.lower()
        place = 1 + sum(type(other) is type(network) for other in named.values())
        named[name if place == 1 else f"{name}_{place}"] = network
    return named


def model_name(module: Evaluation) -> str:
    """Return the folder or hub id of the base model."""
    return str(getattr(module.generator, "path", type(module.generator).__name__))


def results_of_test(module: Evaluation, prompts: Sequence[Prompt], run: RunFacts) -> Results:
    """Return the results of the test that just ran.

    Args:
        module: What was tested, by a trainer with both monitors.
        prompts: The prompts of the test, in their order.
        run: Facts of the run.
    """
    monitors: dict[type, Any] = {type(callback): callback for callback in callbacks_of(module.trainer)}
    bias, quality = monitors[BiasMonitor], monitors[QualityMonitor]
    measured = Measured(bias.summaries, quality.values, bias.agreement, bias.pairs)
    own = module.targets.own_shares(prompts)
    return build_results(module.attribute.names, module.targets.shares(), prompts, measured, run, own)
