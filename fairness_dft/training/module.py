"""Finetune a text-to-image model towards a distribution of faces: the optimizer of `FairnessLoss`.

References:
    Finetuning Text-to-Image Diffusion Models for Fairness (Shen et al., 2024), https://arxiv.org/abs/2311.07604
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor
from typing_extensions import override

from fairness_dft import __version__
from fairness_dft.adapters.base import Adapter
from fairness_dft.attributes import Attribute
from fairness_dft.classifiers.judge import Judge
from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.faces.realism import FaceRealism
from fairness_dft.features import FeatureNet
from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.randomness import Stream, hashed_generator
from fairness_dft.sampling.sampler import Sampler
from fairness_dft.training.fairness_loss import FairnessLoss
from fairness_dft.training.originals import OriginalStore, content_of

Schedule = Literal["constant", "linear", "cosine"]


class FairFinetuning(FairnessLoss):
    """Finetunes a text-to-image model so that perceived attributes follow their target distribution.

    Args:
        generator: The text-to-image model, frozen except for the adapter.
        judge: Finds and classifies the faces that training learns from.
        attribute: What is aligned, one attribute or several jointly, and to which distribution.
        adapter: What is trained; rank-50 LoRA in the text encoder by default.
        sampler: How training images are sampled, and the path of the gradient.
        evaluation_sampler: How images are sampled for validation and test; as in training by default.
        features: Networks whose embeddings of an image should stay close to those of the original image (CLIP, DINO).
        semantics_weight: λ_img, the weight of that loss (paper: 8, race alone 6).
        face_realism: What faces should resemble; None leaves that loss out.
        learning_rate: Of AdamW, where a part of the adapter has none of its own.
        betas: Of AdamW.
        weight_decay: Of AdamW.
        schedule: The learning rate over the run: `constant` (paper), or `linear` or `cosine` down to zero at
            the trainer's `max_steps`, which reduces the noise of a short run's last steps.
        draws: Number of draws for the transport targets where they cannot be enumerated.
        seed: Seeds the number of sampling steps and the choice of the steps that carry gradient.
        originals_folder: Caches what training needs of the original images, a few kilobytes each, for later runs with
            the same noise (`data.noise_pool`); by default the cache is in memory and ends with the run.
    """

    def __init__(
        self,
        generator: TextToImage,
        judge: Judge,
        attribute: Attribute | None = None,
        adapter: Adapter | None = None,
        sampler: Sampler | None = None,
        evaluation_sampler: Sampler | None = None,
        features: Sequence[FeatureNet] = (),
        semantics_weight: float = 8.0,
        face_realism: FaceRealism | None = None,
        learning_rate: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-2,
        schedule: Schedule = "constant",
        draws: int = 256,
        seed: int = 0,
        originals_folder: str | None = None,
    ) -> None:
        super().__init__(
            generator,
            judge,
            attribute,
            adapter,
            sampler,
            evaluation_sampler,
            features,
            semantics_weight,
            face_realism,
            draws,
            seed,
        )
        check_optimizer(learning_rate, betas, weight_decay)
        self.strict_loading = False
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.schedule = schedule
        self.originals_folder = originals_folder

    @override
    def check(self) -> None:
        super().check()
        if self.originals_folder:
            OriginalStore(Path(self.originals_folder), "").check()

    @override
    def load_generator(self) -> None:
        self.generator.load()
        if self.originals_folder:  # hashed before the adapter is attached, whose tensors change
            embedding = self.face_realism and self.face_realism.embedding
            self.base_content = content_of(self.generator, self.judge, list(self.features), embedding)
        super().load_generator()

    def check_end(self, max_steps: int, max_epochs: int | None) -> None:
        """Refuse a schedule that decays towards the end of a run without an end.

        Raises:
            ValueError: If neither steps nor epochs of the trainer are bounded.
        """
        if self.schedule != "constant" and max_steps < 0 and max_epochs in (None, -1):
            raise ValueError(f"--model.schedule={self.schedule} ends with the run: give --trainer.max_steps too")

    @override
    def on_fit_start(self) -> None:
        if self.originals_folder:
            versions = __version__, *(version(name) for name in ("torch", "diffusers", "transformers"))
            settings = self.sampler.guidance_scale, str(self.trainer.precision), self.device.type, *versions
            self.originals.store = OriginalStore(Path(self.originals_folder), f"{self.base_content} {settings}")
            self.originals.store.prepare()
        # Lightning warns of networks in evaluation mode; here they are frozen on purpose.
        warnings.filterwarnings("ignore", message="Found .* in eval mode")
        # And of a first step that was skipped, as the scaled loss of 16-mixed often causes it.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

    @override
    def on_train_start(self) -> None:
        # A checkpoint brings its own learning rates along; those of the configuration count.
        rates = [group["lr"] for group in self.adapter.parameter_groups(self.learning_rate)]
        for config in self.trainer.lr_scheduler_configs:
            if config.name != "learning_rate":
                continue  # it is not the one of `configure_optimizers`: the user brought another optimizer
            scheduler: Any = config.scheduler
            scheduler.base_lrs = rates
            for group, rate, factor in zip(scheduler.optimizer.param_groups, rates, scheduler.lr_lambdas, strict=True):
                group["initial_lr"], group["lr"] = rate, rate * factor(scheduler.last_epoch)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        from transformers import get_scheduler

        optimizer = torch.optim.AdamW(
            self.adapter.parameter_groups(self.learning_rate), betas=self.betas, weight_decay=self.weight_decay
        )
        steps = None if self.schedule == "constant" else int(self.trainer.estimated_stepping_batches)
        scheduler = get_scheduler(self.schedule, optimizer, num_warmup_steps=0, num_training_steps=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "learning_rate"},
        }

    @override
    def training_step(self, batch: PromptBatch, batch_idx: int) -> STEP_OUTPUT:
        return self.loss(batch, self.randomness())

    def randomness(self) -> torch.Generator:
        """Return the random generator of this batch: the same on every rank, and after a resume."""
        return hashed_generator(self.seed, Stream.STEP, self.trainer.fit_loop.total_batch_idx)

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]  # no `destination`
        """Return the adapter alone, trained and averaged; frozen weights are never saved."""
        if not self.loaded:
            return {}
        return {
            f"{name}.{key}": tensor
            for name in ("trained", "ema")
            for key, tensor in self.adapter.state_dict(name).items()
        }

    @override
    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: If it belongs to another adapter.
        """
        for name in ("trained", "ema"):
            own = {key.removeprefix(f"{name}."): v for key, v in state_dict.items() if key.startswith(f"{name}.")}
            self.adapter.load_state_dict(own, name)


def check_optimizer(learning_rate: float, betas: Sequence[float], weight_decay: float) -> None:
    """Refuse settings of the optimizer that are out of range.

    Raises:
        ValueError: If one is.
    """
    for name, value in {"learning_rate": learning_rate, "weight_decay": weight_decay}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"--model.{name} must be finite and not negative, but is {value}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"--model.betas must be at least 0 and below 1, but are {list(betas)}")
