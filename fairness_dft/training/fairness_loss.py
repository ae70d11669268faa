"""The paper's loss of one batch: what training minimizes, and what a diagnosis differentiates.

For one prompt P and N noises z_T: sample x with the trained model and o with the original one; find and classify the
faces, p = h(x); gather p over ranks and assign the targets y; form L = L_align + λ_img L_img + λ_face L_face. The
gradient travels back through the sampler along the path that `sampler.gradient` describes.

References:
    Finetuning Text-to-Image Diffusion Models for Fairness (Shen et al., 2024), https://arxiv.org/abs/2311.07604
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from fairness_dft.adapters.base import Adapter
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
from fairness_dft.alignment.targets import named
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
from fairness_dft.training.evaluation import Evaluation
from fairness_dft.training.originals import Original, Originals


class FairnessLoss(Evaluation):
    """An evaluation that can also compute the loss of a batch, with its gradient; it takes no step.

    Args:
        generator: The text-to-image model, frozen except for the adapter.
        judge: Finds and classifies the faces.
        attribute: What is aligned, one attribute or several jointly, and to which distribution.
        adapter: What is trained; rank-50 LoRA in the text encoder by default.
        sampler: How training images are sampled, and the path of the gradient.
        evaluation_sampler: How images are sampled for validation and test; as in training by default.
        features: Networks whose embeddings of an image should stay close to those of the original image (CLIP, DINO).
        semantics_weight: λ_img, the weight of that loss (paper: 8, race alone 6).
        face_realism: What faces should resemble; None leaves that loss out.
        draws: Number of draws for the transport targets where they cannot be enumerated.
        seed: Seeds the number of sampling steps and the choice of the steps that carry gradient.
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
        draws: int = 256,
        seed: int = 0,
    ) -> None:
        sampler = sampler or Sampler()
        super().__init__(generator, judge, attribute, adapter, evaluation_sampler or sampler, features, seed)
        if not 0 <= semantics_weight < float("inf"):
            raise ValueError(f"--model.semantics_weight must be finite and not negative, but is {semantics_weight}")
        if draws < 1:
            raise ValueError(f"--model.draws must be at least 1, but is {draws}")
        self.sampler, self.semantics_weight, self.face_realism = sampler, semantics_weight, face_realism
        self.draws = draws
        self.originals = Originals()

    @override
    def check(self) -> None:
        super().check()
        if self.face_realism:
            if not self.judge.faces.finds_landmarks:
                raise ValueError(
                    "--model.face_realism needs landmarks: let fairness_dft.faces.DetectedFaces be model.judge.faces"
                )
            self.face_realism.check()

    @override
    def load_observers(self) -> None:
        super().load_observers()
        if self.face_realism:
            self.face_realism.load()

    def loss(self, batch: PromptBatch, random: torch.Generator) -> Tensor:
        """Compute the paper's loss L of a batch, with a graph, and log its parts.

        Args:
            batch: The prompt P, and the seeds of this rank's noises.
            random: Draws the number of sampling steps, the steps that carry gradient, and targets; the same on every
                rank.

        Returns:
            A scalar.
        """
        noise, steps = self.generator.noise(batch.seeds), self.draw_steps(batch, random)
        latents, original = self.sample(batch, noise, steps, random)
        images = self.sampler.decode(self.generator, latents)

        result = self.judge.submit(images)  # on the CPU, while a GPU embeds the images
        scales = torch.ones_like(images[:, :1])  # filled in below, once the faces are known
        embeddings = self.embed(scale_gradient(images, scales))
        verdict = result()
        alignments = self.assign(verdict, self.targets.in_training(batch.prompt).joint, random)
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
        """Log the parts of the loss, and the bias of the batch.

        A value that does not exist is not logged: the loss of no target, the bias of no face. Nor is the bias of a
        prompt that names a class of an aligned attribute, which the model should show.
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
            counts = torch.bincount(classes, minlength=self.targets.general.joint.numel())
            self.log("batch/bias", class_bias(counts / len(classes)), prog_bar=True)
            self.log("batch/floor", float(finite_sample_floor(len(classes), len(counts))), prog_bar=True)

    def draw_steps(self, batch: PromptBatch, random: torch.Generator) -> int:
        """Draw the number of sampling steps: for repeated noise the same each time, so that originals repeat too."""
        if batch.noise_set is not None:
            random = hashed_generator(self.seed, Stream.REPEATED_STEP, batch.index, batch.noise_set)
        return self.sampler.draw_steps(random)

    def sample(self, batch: PromptBatch, noise: Tensor, steps: int, random: torch.Generator) -> tuple[Tensor, Original]:
        """Sample the trained model, with a graph, and get or sample the original images.

        Original images that are not cached are sampled too. Where both models have the same denoising network, because
        only a text encoder or tokens learn, they share its calls, except for those with a graph.

        Returns:
            The final latents of the trained model, with shape (N, C, h, w), and what training needs of the originals.
        """
        separate = self.generator.denoiser_learns()
        original = self.original(batch, noise, steps) if separate else self.originals.get(batch, steps, noise.device)
        base: list[PromptEmbeddings] = []
        if original is None:
            with torch.no_grad(), self.adapter.using("original"):
                base = [encode_prompts(self.generator, batch.prompt.text)]
        texts = [encode_prompts(self.generator, batch.prompt.text), *base]
        latents, *others = self.sampler.sample(self.generator, texts, noise, steps, random)
        if original is None:
            original = self.look_at_original(batch, others[0], steps)
        return latents, original

    @torch.no_grad()
    def original(self, batch: PromptBatch, noise: Tensor, steps: int) -> Original:
        """Return what training needs of the original images, sampled on their own if it is not cached."""
        original = self.originals.get(batch, steps, noise.device)
        if original is None:
            with self.adapter.using("original"):
                texts = [encode_prompts(self.generator, batch.prompt.text)]
                [latents] = self.sampler.sample(self.generator, texts, noise, steps)
            original = self.look_at_original(batch, latents, steps)
        return original

    @torch.no_grad()
    def look_at_original(self, batch: PromptBatch, latents: Tensor, steps: int) -> Original:
        """Decode the original model's latents, and cache what training needs of the images."""
        with self.adapter.using("original"):
            images = self.sampler.decode(self.generator, latents)
        result = self.judge.submit(images)
        features = self.embed(images)
        verdict = result()
        original = Original(verdict, features, self.embed_faces(images, verdict))
        self.originals.put(batch, steps, original)
        return original

    def embed(self, images: Tensor) -> list[Tensor]:
        """Return the embeddings by each feature network, with shapes (N, D)."""
        return [self.sampler.map_chunks(network, images) for network in self.features]

    def assign(self, verdict: Verdict, target: Tensor, random: torch.Generator) -> dict[str, Alignment]:
        """Assign optimal-transport targets to the global batch, and return this rank's share for each attribute.

        Args:
            verdict: What the classifier sees in this rank's images.
            target: D, the target distribution of the prompt, with shape (K_1, ..., K_A).
            random: Draws counts where they cannot be enumerated; the same on every rank.
        """
        face = self.gather(verdict.has_face)
        names = self.attribute.names
        probabilities = [self.gather(verdict.probabilities(name).detach()) for name in names]
        for values in probabilities:  # a broken image has no target; the loss becomes NaN and reports it
            face = face & values.isfinite().all(1)
        probabilities = [values[face] for values in probabilities]
        expected = expected_joint_targets(
            probabilities, target, self.draws, generator=random, rescale_cost=self.attribute.rescale_cost
        )
        here = slice(self.global_rank * len(verdict.has_face), (self.global_rank + 1) * len(verdict.has_face))
        alignments = {}
        for name, of_faces in zip(names, expected, strict=True):
            targets = torch.zeros(len(face), dtype=torch.long, device=face.device)
            chosen = torch.zeros_like(face)
            targets[face] = of_faces.classes
            chosen[face] = of_faces.decided(self.attribute.setting("confidence", name))
            alignments[name] = Alignment(targets[here], chosen[here], int(chosen.sum()))
        return alignments

    def gather(self, values: Tensor) -> Tensor:
        """Return the rows of all ranks, rank after rank; every rank has the same number."""
        if self.trainer.world_size == 1:
            return values
        gathered = self.all_gather(values)
        assert isinstance(gathered, Tensor)  # as the values are
        return gathered.flatten(0, 1)

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
        """Compute L_img of this batch, from the embeddings of its images by each feature network."""
        pairs = zip(embeddings, original.features, strict=True)
        return semantics_loss([(embedding * reference).sum(-1) for embedding, reference in pairs], semantics_factor)

    def embed_faces(self, images: Tensor, verdict: Verdict) -> Tensor | None:
        """Return embeddings of the aligned faces, with shape (N, D); None without face realism."""
        if self.face_realism is None:
            return None
        embedding = self.face_realism.embedding
        assert verdict.landmarks is not None  # `check` refuses a face finder without them
        return self.sampler.map_chunks(embedding, embedding.align(images, verdict.landmarks))

    def realism(self, images: Tensor, verdict: Verdict, original: Original, alignments: dict[str, Alignment]) -> Tensor:
        """Compute L_face of this batch, and log it if there is a face."""
        before, realism = original.verdict, self.face_realism
        embeddings = self.embed_faces(images, verdict)
        assert realism is not None and embeddings is not None and original.faces is not None
        keep = before.has_face
        for name, chosen in alignments.items():
            sure, classes = before.probabilities(name).max(1)
            keep = keep & chosen.chosen & (chosen.targets == classes) & (sure >= realism.confidence)
        references = face_references(embeddings, original.faces, keep, realism.bank)
        total = int(self.gather(verdict.has_face).sum())
        loss = face_realism_loss(embeddings, references, verdict.has_face, total, self.trainer.world_size)
        if total:
            self.log("loss/face", loss, sync_dist=True)
        return loss
