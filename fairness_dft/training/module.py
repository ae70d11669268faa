"""The paper's algorithm as a LightningModule: finetune a text-to-image model towards a distribution of faces.

One training step, for one prompt P and N noises z_T: sample x with the trained model and o with the frozen one; find
and classify the faces, p = h(x); gather p over ranks and assign the targets y; form L = L_align + λ_img L_img +
λ_face L_face. The gradient travels back through the sampler along the path that `sampler.gradient` describes.

References:
    Finetuning Text-to-Image Diffusion Models for Fairness (Shen et al., 2024), https://arxiv.org/abs/2311.07604
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from fairness_dft import __version__
from fairness_dft.adapters.base import Adapter, Name
from fairness_dft.adapters.lora import TextEncoderLoRA
from fairness_dft.alignment.losses import (
    Alignment,
    alignment_loss,
    dynamic_weights,
    face_gradient_scales,
    face_realism_loss,
    face_references,
    must_change,
    semantics_loss,
)
from fairness_dft.alignment.targets import PromptTargets, named
from fairness_dft.alignment.transport import expected_joint_targets
from fairness_dft.attributes import Attribute
from fairness_dft.classifiers.judge import Judge, Verdict
from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.faces.realism import FaceRealism
from fairness_dft.features import FeatureNet
from fairness_dft.metrics.bias import class_bias, finite_sample_floor
from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.prompts.files import Prompt
from fairness_dft.randomness import Stream, hashed_generator
from fairness_dft.sampling.gradients import scale_gradient
from fairness_dft.sampling.sampler import PromptEmbeddings, Sampler, encode_prompts
from fairness_dft.training.originals import Original, Originals, OriginalStore, content_of

Schedule = Literal["constant", "linear", "cosine"]


class FairFinetuning(LightningModule):
    """Finetunes a text-to-image model so that perceived attributes follow their target distribution.

    Args:
        generator: the text-to-image model, frozen but for the adapter.
        judge: finds and classifies the faces that training learns from.
        attribute: what is aligned, one attribute or several jointly, and to which distribution.
        adapter: what is trained; rank-50 LoRA in the text encoder by default.
        sampler: how training images are sampled, and the path of the gradient.
        evaluation_sampler: how images are sampled for validation and test; as in training by default.
        features: networks whose embeddings of an image should stay as the frozen model's (CLIP and DINO).
        semantics_weight: λ_img, the weight of that loss (paper: 8, race alone 6).
        face_realism: what faces should resemble; None leaves that loss out.
        learning_rate: of AdamW, where a part of the adapter has none of its own.
        betas: of AdamW.
        weight_decay: of AdamW.
        schedule: the learning rate over the run: `constant` (paper), or `linear` or `cosine` down to zero at
            the trainer's `max_steps`, which takes the noise out of a short run's last steps.
        draws: number of draws for the transport targets where they cannot be enumerated.
        seed: seeds the number of sampling steps and the steps that carry gradient.
        originals_folder: keeps what training needs to know of the frozen model's images, a few kilobytes each, for
            later runs, where the same noise is_repeated (`data.noise_pool`); by default this run alone remembers it.
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
        super().__init__()
        check_numbers(learning_rate, betas, weight_decay, semantics_weight, draws)
        self.strict_loading = False
        self.generator, self.judge, self.features = generator, judge, nn.ModuleList(features)
        self.attribute = attribute or Attribute()
        self.adapter = adapter or TextEncoderLoRA()
        self.sampler = sampler or Sampler()
        self.evaluation_sampler = evaluation_sampler or self.sampler
        self.semantics_weight, self.face_realism = semantics_weight, face_realism
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.schedule = schedule
        self.draws, self.seed = draws, seed
        self.originals_folder, self.originals = originals_folder, Originals()
        self.loaded = False

    @override
    def configure_model(self) -> None:
        """Load all networks and attach the adapter, once, on every rank."""
        if self.loaded:
            return
        self.generator.check()
        if self.originals_folder:
            OriginalStore(Path(self.originals_folder), "").check()
        if self.face_realism:
            if not self.judge.faces.finds_landmarks:
                raise ValueError(
                    "--model.face_realism needs landmarks: let fairness_dft.faces.DetectedFaces be model.judge.faces"
                )
            self.face_realism.check()
        self.judge.load()
        if self.face_realism:
            self.face_realism.load()
        self.targets = PromptTargets(self.attribute, self.judge.classes)
        for network in self.features:
            network.load()
        self.generator.load()
        if self.originals_folder:
            embedding = self.face_realism and self.face_realism.embedding
            self.frozen = content_of(self.generator, self.judge, list(self.features), embedding)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.adapter.attach(self.generator)
        self.loaded = True

    def check_end(self, max_steps: int, max_epochs: int | None) -> None:
        """Refuse a schedule that falls towards an end where there is none.

        Raises:
            ValueError: if neither steps nor epochs of the trainer are bounded.
        """
        if self.schedule != "constant" and max_steps < 0 and max_epochs in (None, -1):
            raise ValueError(f"--model.schedule={self.schedule} ends with the run: give --trainer.max_steps too")

    @override
    def on_fit_start(self) -> None:
        if self.originals_folder:
            versions = __version__, *(version(name) for name in ("torch", "diffusers", "transformers"))
            settings = self.sampler.guidance_scale, str(self.trainer.precision), self.device.type, *versions
            self.originals.store = OriginalStore(Path(self.originals_folder), f"{self.frozen} {settings}")
        # Lightning warns of networks in evaluation mode; here they are frozen on purpose.
        warnings.filterwarnings("ignore", message="Found .* in eval mode")
        # And of a first step that was skipped, as the scaled loss of 16-mixed often makes it.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

    @override
    def on_train_start(self) -> None:
        # A checkpoint brings its own learning rates along; those of the configuration count.
        rates = [group["lr"] for group in self.adapter.parameter_groups(self.learning_rate)]
        for config in self.trainer.lr_scheduler_configs:
            if config.name != "learning_rate":
                continue  # it is not the one of `configure_optimizers`: the user brought another optimizer
            scheduler = config.scheduler
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
        random = self.randomness()
        noise, steps = self.generator.noise(batch.seeds), self.draw_steps(batch, random)
        latents, original = self.sample(batch, noise, steps, random)
        images = self.sampler.decode(self.generator, latents)

        result = self.judge.submit(images)  # on the CPU, while a GPU embeds the images
        scales = torch.ones_like(images[:, :1])  # filled in below, once the faces are known
        embeddings = self.embed(scale_gradient(images, scales))
        verdict = result()
        alignments = self.assign(verdict, self.targets.in_training(batch.prompt), random)
        align = {
            name: alignment_loss(verdict.logits[name], alignment, self.trainer.world_size)
            for name, alignment in alignments.items()
        }
        semantics_factor, face_gradient_factor = self.semantics_factors(verdict, original, alignments)
        scales.copy_(face_gradient_scales(images, verdict.boxes, original.verdict.boxes, face_gradient_factor))
        semantics = self.image_semantics(embeddings, original, semantics_factor)
        loss = sum(align.values()) + self.semantics_weight * semantics
        if self.face_realism:
            loss = loss + self.face_realism.weight * self.realism(images, verdict, original, alignments)

        self.report_step(batch.prompt, loss, align, semantics, verdict, alignments)
        return loss

    def report_step(
        self,
        prompt: Prompt,
        loss: Tensor,
        align: dict[str, Tensor],
        semantics: Tensor,
        verdict: Verdict,
        alignments: dict[str, Alignment],
    ) -> None:
        """Log a training step; what has no value, as the loss of no target or the bias of no face, is not logged.

        Nor is the bias of a prompt that names what is aligned, and is to be obeyed.
        """
        values = {"loss/semantics": semantics, "faces/with_face": verdict.has_face.float().mean()}
        for name, alignment in alignments.items():
            suffix = f"_{name}" if len(alignments) > 1 else ""
            values[f"faces/with_target{suffix}"] = alignment.chosen.float().mean()
            if alignment.total:
                values[f"loss/alignment{suffix}"] = align[name]
        self.log_dict(values, sync_dist=True)
        self.log("loss/total", loss, prog_bar=True, sync_dist=True)
        classes = self.gather(verdict.classes(self.attribute.label))[self.gather(verdict.has_face)]
        if len(classes) and not named(self.attribute, prompt):
            counts = torch.bincount(classes, minlength=self.targets.general.numel())
            self.log("batch/bias", class_bias(counts / len(classes)), prog_bar=True)
            self.log("batch/floor", float(finite_sample_floor(len(classes), len(counts))), prog_bar=True)

    def randomness(self) -> torch.Generator:
        """Draws of this batch: the same on every rank, and after a resume the same as without it."""
        batches = self.trainer.fit_loop.total_batch_idx
        return hashed_generator(self.seed, Stream.STEP, batches)

    def draw_steps(self, batch: PromptBatch, random: torch.Generator) -> int:
        """Draw the number of sampling steps: for repeated noise the same each time, so that originals repeat too."""
        if batch.is_repeated:
            random = hashed_generator(self.seed, Stream.REPEATED_STEP, batch.index, batch.noise_set)
        return self.sampler.draw_steps(random)

    @torch.no_grad()
    def generate(self, name: Name, sampler: Sampler, batch: PromptBatch, noise: Tensor, steps: int) -> Tensor:
        """Images of the original, trained or EMA model, without a graph, with shape (N, 3, H, W), in [0, 1]."""
        with self.adapter.using(name):
            return sampler(self.generator, batch.prompt.text, noise, steps)

    def sample(self, batch: PromptBatch, noise: Tensor, steps: int, random: torch.Generator) -> tuple[Tensor, Original]:
        """Final latents of the trained model, with a graph, and what training needs to know of the original images.

        Where that is not remembered the frozen model samples too: in the same calls of the denoising network, but for
        those with a graph, if both models have the same one, as they have where a text encoder or tokens learn.
        """
        apart = self.generator.denoiser_learns()
        original = self.original(batch, noise, steps) if apart else self.originals.get(batch, steps, noise.device)
        frozen: list[PromptEmbeddings] = []
        if original is None:
            with torch.no_grad(), self.adapter.using("original"):
                frozen = [encode_prompts(self.generator, batch.prompt.text)]
        texts = [encode_prompts(self.generator, batch.prompt.text), *frozen]
        latents, *others = self.sampler.sample(self.generator, texts, noise, steps, random)
        if original is None:
            original = self.look_at_original(batch, *others, steps)
        return latents, original

    @torch.no_grad()
    def original(self, batch: PromptBatch, noise: Tensor, steps: int) -> Original:
        """What training needs to know of the frozen model's images o, sampled by themselves if it is not remembered."""
        original = self.originals.get(batch, steps, noise.device)
        if original is None:
            with self.adapter.using("original"):
                texts = [encode_prompts(self.generator, batch.prompt.text)]
                latents = self.sampler.sample(self.generator, texts, noise, steps)
            original = self.look_at_original(batch, *latents, steps)
        return original

    @torch.no_grad()
    def look_at_original(self, batch: PromptBatch, latents: Tensor, steps: int) -> Original:
        """Decode the frozen model's latents, and keep what training needs to know of the images."""
        with self.adapter.using("original"):
            images = self.sampler.decode(self.generator, latents)
        result = self.judge.submit(images)
        features = self.embed(images)
        verdict = result()
        original = Original(verdict, features, self.embed_faces(images, verdict))
        self.originals.put(batch, steps, original)
        return original

    def embed(self, images: Tensor) -> list[Tensor]:
        """Embeddings by each feature network, with shapes (N, D)."""
        return [self.sampler.map_chunks(network, images) for network in self.features]

    def assign(self, verdict: Verdict, target: Tensor, random: torch.Generator) -> dict[str, Alignment]:
        """Optimal-transport targets of the global batch for each attribute, and this rank's share of them."""
        face = self.gather(verdict.has_face)
        names = self.attribute.names
        probabilities = [self.gather(verdict.probabilities(name).detach()) for name in names]
        for values in probabilities:  # a broken image has no target; the loss tells of it
            face = face & values.isfinite().all(1)
        probabilities = [values[face] for values in probabilities]
        found = expected_joint_targets(
            probabilities, target, self.draws, generator=random, rescale_cost=self.attribute.rescale_cost
        )
        here = slice(self.global_rank * len(verdict.has_face), (self.global_rank + 1) * len(verdict.has_face))
        alignments = {}
        for name, of_faces in zip(names, found, strict=True):
            targets = torch.zeros(len(face), dtype=torch.long, device=face.device)
            chosen = torch.zeros_like(face)
            targets[face] = of_faces.classes
            chosen[face] = of_faces.decided(self.attribute.setting("confidence", name))
            alignments[name] = Alignment(targets[here], chosen[here], int(chosen.sum()))
        return alignments

    def gather(self, values: Tensor) -> Tensor:
        """Rows of all ranks, rank after rank; every rank has the same number."""
        return self.all_gather(values).flatten(0, 1) if self.trainer.world_size > 1 else values

    def semantics_factors(
        self, verdict: Verdict, original: Original, alignments: dict[str, Alignment]
    ) -> tuple[Tensor, Tensor]:
        """Return both factors of each image, with shapes (N,): 1 where it may keep the class of the original."""
        both_faces = verdict.has_face & original.verdict.has_face
        changing = [
            must_change(chosen, original.verdict.classes(name), both_faces) for name, chosen in alignments.items()
        ]
        settings = (
            [self.attribute.setting(factor, name) for name in alignments]
            for factor in ("semantics_factor", "face_gradient_factor")
        )
        semantics_factor, face_gradient_factor = (dynamic_weights(changing, values) for values in settings)
        return semantics_factor, face_gradient_factor

    def image_semantics(self, embeddings: Sequence[Tensor], original: Original, semantics_factor: Tensor) -> Tensor:
        """L_img of this batch, from the embeddings of its images by each feature network."""
        pairs = zip(embeddings, original.features, strict=True)
        return semantics_loss([(embedding * reference).sum(-1) for embedding, reference in pairs], semantics_factor)

    def embed_faces(self, images: Tensor, verdict: Verdict) -> Tensor | None:
        """Embeddings of the aligned faces, with shape (N, D), where face realism asks for them."""
        if self.face_realism is None:
            return None
        embedding = self.face_realism.embedding
        return self.sampler.map_chunks(embedding, embedding.align(images, verdict.landmarks))

    def realism(self, images: Tensor, verdict: Verdict, original: Original, alignments: dict[str, Alignment]) -> Tensor:
        """L_face of this batch, logged where there is a face."""
        before = original.verdict
        keep = before.has_face
        for name, chosen in alignments.items():
            sure, classes = before.probabilities(name).max(1)
            keep = keep & chosen.chosen & (chosen.targets == classes) & (sure >= self.face_realism.confidence)
        embeddings = self.embed_faces(images, verdict)
        references = face_references(embeddings, original.faces, keep, self.face_realism.bank)
        total = int(self.gather(verdict.has_face).sum())
        loss = face_realism_loss(embeddings, references, verdict.has_face, total, self.trainer.world_size)
        if total:
            self.log("loss/face", loss, sync_dist=True)
        return loss

    @override
    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Tensor]:
        return self.compare(batch, ("original", "trained", "ema"))

    @override
    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Tensor]:
        return self.compare(batch, ("original", "ema"))

    def compare(self, batch: PromptBatch, names: Sequence[Name]) -> dict[str, Tensor]:
        """Images of several models from the same noise in the same number of steps, for callbacks to measure."""
        noise = self.generator.noise(batch.seeds)
        steps = self.evaluation_sampler.draw_steps(torch.Generator().manual_seed(self.seed))
        return {name: self.generate(name, self.evaluation_sampler, batch, noise, steps) for name in names}

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The adapter alone, trained and averaged; frozen weights are never saved."""
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
            ValueError: if it belongs to another adapter.
        """
        for name in ("trained", "ema"):
            own = {key.removeprefix(f"{name}."): v for key, v in state_dict.items() if key.startswith(f"{name}.")}
            self.adapter.load_state_dict(own, name)


def check_numbers(
    learning_rate: float, betas: Sequence[float], weight_decay: float, semantics_weight: float, draws: int
) -> None:
    """Refuse settings of the training that are out of range.

    Raises:
        ValueError: if one is.
    """
    numbers = {"learning_rate": learning_rate, "weight_decay": weight_decay, "semantics_weight": semantics_weight}
    for name, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"--model.{name} must be finite and not negative, but is {value}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"--model.betas must be at least 0 and below 1, but are {list(betas)}")
    if draws < 1:
        raise ValueError(f"--model.draws must be at least 1, but is {draws}")
