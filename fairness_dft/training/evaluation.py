"""Evaluation: sample the base model and the finetuned model from the same noise, for others to measure.

An `Evaluation` holds a text-to-image model with its adapter, the classifier and the feature networks, and only looks:
it has no optimizer and no training step. What trains (`FairFinetuning`), audits (`Audit`) or diagnoses (`Diagnosis`) is
a child of it, so that all of them sample and measure in the same way.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn
from typing_extensions import Self, override

from fairness_dft.adapters.base import Adapter, Name
from fairness_dft.adapters.lora import TextEncoderLoRA
from fairness_dft.alignment.targets import PromptTargets
from fairness_dft.attributes import Attribute
from fairness_dft.classifiers.judge import Judge
from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.features import FeatureNet
from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.prompts.files import Prompt
from fairness_dft.sampling.sampler import Sampler
from fairness_dft.training.finished_run import FinishedRun


class Evaluation(LightningModule):
    """Samples the original, the trained and the averaged (EMA) model from the same noise, and changes none of them.

    Args:
        generator: The text-to-image model, frozen.
        judge: Finds and classifies the faces.
        attribute: What is aligned, one attribute or several jointly, and to which distribution.
        adapter: What was trained; rank-50 LoRA in the text encoder by default.
        evaluation_sampler: How images are sampled.
        features: Networks that embed images, to measure what the finetuned model keeps (CLIP and DINO).
        seed: Seeds the initial adapter, and the number of sampling steps where the sampler draws it.

    Example:
        Sample both models of a finished run from the same noise, classify the faces, and print the bias:

        ```python
        import torch
        from fairness_dft.metrics.bias import class_bias
        from fairness_dft.training import Evaluation

        evaluation = Evaluation.from_run("runs/quickstart/version_0")
        images = evaluation.sample_models("A photo of the face of a firefighter, a person", count=24)
        for model, pictures in images.items():  # original and ema, from the same noise
            verdict = evaluation.judge(pictures)
            classes = verdict.classes("gender")[verdict.has_face]
            frequencies = torch.bincount(classes, minlength=2) / len(classes)
            print(f"{model}: bias {class_bias(frequencies):.2f}")
        ```
    """

    def __init__(
        self,
        generator: TextToImage,
        judge: Judge,
        attribute: Attribute | None = None,
        adapter: Adapter | None = None,
        evaluation_sampler: Sampler | None = None,
        features: Sequence[FeatureNet] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.generator, self.judge, self.features = generator, judge, nn.ModuleList(features)
        self.attribute = attribute or Attribute()
        self.adapter = adapter or TextEncoderLoRA()
        self.evaluation_sampler = evaluation_sampler or Sampler()
        self.seed = seed
        self.loaded = False

    @classmethod
    def from_run(cls, folder: str | Path, step: int | None = None, other_classes: bool = False) -> Self:
        """Open a finished run: build its networks from config.yaml, and load its trained and averaged adapter.

        Args:
            folder: Folder of a run, such as runs/gender/version_0.
            step: After how many training steps the adapter was exported; the last ones by default.
            other_classes: Whether config.yaml may name classes from outside this package. They are imported, so only
                allow this for runs that you trust.

        Returns:
            A loaded evaluation on the CPU; `.to("cuda")` moves it.

        Raises:
            ValueError: If the folder is not a run, or something that it names cannot be loaded.
        """
        run = FinishedRun(folder)
        adapters: dict[Name, Path] = {"trained": run.adapter(step, "trained"), "ema": run.adapter(step, "ema")}
        evaluation = run.build(cls, settings_for(cls, run.module_settings()), other_classes)
        evaluation.configure_model()
        for name, path in adapters.items():
            evaluation.adapter.load(path, name)
        return evaluation.eval()

    @override
    def configure_model(self) -> None:
        """Load all networks and attach the adapter, once, on every rank."""
        if self.loaded:
            return
        self.check()
        self.load_observers()
        self.load_generator()
        self.loaded = True

    def check(self) -> None:
        """Refuse what can be refused before anything is loaded.

        Raises:
            ValueError: If the text-to-image model is not within reach.
        """
        self.generator.check()

    def load_observers(self) -> None:
        """Load the networks that look at images, which are small, and match the targets with their classes.

        Raises:
            ValueError: If a network cannot be loaded, or a target does not fit the classes.
        """
        self.judge.load()
        self.targets = PromptTargets(self.attribute, self.judge.classes)
        for network in self.features:
            cast(FeatureNet, network).load()

    def load_generator(self) -> None:
        """Load the text-to-image model and attach the adapter.

        Raises:
            ValueError: If the model cannot be loaded, or the adapter does not fit it.
        """
        self.generator.load()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.adapter.attach(self.generator)

    @torch.no_grad()
    def generate(self, name: Name, sampler: Sampler, batch: PromptBatch, noise: Tensor, steps: int) -> Tensor:
        """Return images of one model, without a graph, with shape (N, 3, H, W), in [0, 1]."""
        with self.adapter.using(name):
            return sampler(self.generator, batch.prompt.text, noise, steps)

    def compare(self, batch: PromptBatch, names: Sequence[Name]) -> dict[str, Tensor]:
        """Sample several models from the same noise in the same number of steps.

        Args:
            batch: The prompt, and the seeds of the noise.
            names: The models, of original, trained and ema.

        Returns:
            The images of each model, with shape (N, 3, H, W), in [0, 1].
        """
        noise = self.generator.noise(batch.seeds)
        steps = self.evaluation_sampler.draw_steps(torch.Generator().manual_seed(self.seed))
        return {name: self.generate(name, self.evaluation_sampler, batch, noise, steps) for name in names}

    def sample_models(
        self, prompt: str, count: int = 8, first_seed: int = 0, names: Sequence[Name] = ("original", "ema")
    ) -> dict[str, Tensor]:
        """Sample several models from the same noise, for one prompt.

        Args:
            prompt: The text.
            count: Images of each model.
            first_seed: Seed of the first image's noise; the others follow.
            names: The models, of original, trained and ema.

        Returns:
            The images of each model, with shape (count, 3, H, W), in [0, 1].
        """
        seeds = torch.arange(first_seed, first_seed + count)
        return self.compare(PromptBatch(prompt=Prompt(prompt, prompt, "own"), index=0, seeds=seeds), names)

    @override
    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Tensor]:
        return self.compare(batch, ("original", "trained", "ema"))

    @override
    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Tensor]:
        return self.compare(batch, ("original", "ema"))


def settings_for(module: type[Evaluation], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a finetuning that another module also has.

    Args:
        module: What is built with them.
        settings: All settings of a finetuning, by name. Where they have no `evaluation_sampler`, the sampler of the
            training takes its place, as in the finetuning itself.
    """
    settings = {**settings, "evaluation_sampler": settings.get("evaluation_sampler") or settings.get("sampler")}
    return {name: settings[name] for name in signature(module).parameters if name in settings}
