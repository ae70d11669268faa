"""The authors' training step, written again to be read, on the networks of this project.

For one prompt and N noises it runs the sampler three times: with the trained model and no graph, for the classes that
the targets are assigned to; with the frozen model and no graph, for what images should resemble; and with the trained
model and a graph, one micro-batch after the other, each with its own loss and its own backward pass. The U-Net and the
VAE keep the inputs of their blocks and compute the blocks again (gradient checkpointing of diffusers), latents are
detached before they enter the U-Net, and a hook scales the gradient of each prediction. The losses and how they are
normalized are ours, so that gradients can be compared.

References:
    The authors' published code: https://github.com/sail-sg/finetune-fair-diffusion
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from fairness_dft.alignment.losses import alignment_loss, face_gradient_scales
from fairness_dft.classifiers.judge import Verdict
from fairness_dft.networks.frozen_layers import FrozenConv2d, GroupNormSiLU
from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.sampling.gradients import authors_weights, scale_gradient
from fairness_dft.training.fairness_loss import FairnessLoss
from fairness_dft.training.originals import Original


def sample(module: FairnessLoss, prompt: str, noise: Tensor, steps: int) -> Tensor:
    """Images of the active adapter, with a graph where gradients are enabled, in one piece."""
    generator, scale = module.generator, module.sampler.guidance_scale
    prompts = [prompt] * len(noise)
    conditioning, unconditional = generator.encode(prompts), generator.encode([""] * len(noise))
    scheduler = copy.deepcopy(generator.scheduler)
    scheduler.set_timesteps(steps, device=noise.device)
    weights = authors_weights(scheduler, scheduler.timesteps).tolist()
    latents = noise * scheduler.init_noise_sigma
    for timestep, weight in zip(scheduler.timesteps, weights, strict=True):
        inputs = scheduler.scale_model_input(latents.detach(), timestep)
        prediction = generator.guided(inputs, timestep, conditioning, unconditional, scale)
        if prediction.requires_grad:
            prediction.register_hook(lambda gradient, weight=weight: gradient * weight)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return generator.decode(latents)


class GroupNormThenSiLU(GroupNormSiLU):
    """Keeps what a group normalization and an activation after it keep."""

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return self.both(inputs)


@contextmanager
def layers_that_keep(module: nn.Module) -> Iterator[None]:
    """Within, layers keep for the way back what PyTorch's do."""
    plain = {FrozenConv2d: nn.Conv2d, GroupNormSiLU: GroupNormThenSiLU}
    own = {layer: type(layer) for layer in module.modules() if type(layer) in plain}
    for layer, kind in own.items():
        layer.__class__ = plain[kind]
    try:
        yield
    finally:
        for layer, kind in own.items():
            layer.__class__ = kind


@contextmanager
def blocks_again(module: FairnessLoss) -> Iterator[None]:
    """Within, U-Net and VAE compute their blocks again in the backward pass."""
    networks = module.generator.unet, module.generator.vae
    for network in networks:
        network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for network in networks:
            network.disable_gradient_checkpointing()


def slices(count: int, size: int) -> list[slice]:
    """Rows 0 to `count`, `size` at a time."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def rows_of(verdict: Verdict, rows: slice) -> Verdict:
    """What was seen in some of the images."""
    logits = {name: values[rows] for name, values in verdict.logits.items()}
    return Verdict(logits, verdict.has_face[rows], verdict.boxes[rows])


def authors_step(
    module: FairnessLoss,
    batch: PromptBatch,
    micro_batch: int,
    sampling_batch: int,
    randomness: Callable[[], torch.Generator],
    backward: Callable[[Tensor], None],
) -> None:
    """Leave the gradient of one training step in the parameters.

    Args:
        module: the networks, losses and settings; `sampler.gradient` is not read.
        batch: prompt and seeds.
        micro_batch: images of the pass with a graph, at a time.
        sampling_batch: images of the passes without, at a time.
        randomness: returns the random generator of this step, from its start.
        backward: called with the loss of each micro-batch.
    """
    noise, steps = module.generator.noise(batch.seeds), module.sampler.draw_steps(randomness())
    prompt, parts, larger = batch.prompt.text, slices(len(noise), micro_batch), slices(len(noise), sampling_batch)

    with torch.no_grad():
        images = torch.cat([sample(module, prompt, noise[part], steps) for part in larger])
        alignments = module.assign(module.judge(images), module.targets.in_training(batch.prompt).joint, randomness())
        with module.adapter.using("original"):
            images = torch.cat([sample(module, prompt, noise[part], steps) for part in larger])
        verdict = module.judge(images)
        features = [torch.cat([net(images[part]) for part in larger]) for net in module.features]

    for part in parts:
        own = {name: replace(a, targets=a.targets[part], chosen=a.chosen[part]) for name, a in alignments.items()}
        original = Original(rows_of(verdict, part), [feature[part] for feature in features])
        with layers_that_keep(module), blocks_again(module):
            images = sample(module, prompt, noise[part], steps)
            scales = torch.ones_like(images[:, :1])
            embeddings = module.embed(scale_gradient(images, scales))
            found = module.judge(images)
            loss = sum(alignment_loss(found.logits[name], alignment) for name, alignment in own.items())
            semantics_factor, face_gradient_factor = module.semantics_factors(found, original, own)
            scales.copy_(face_gradient_scales(images, found.boxes, original.verdict.boxes, face_gradient_factor))
            semantics = module.image_semantics(embeddings, original, semantics_factor) * len(images) / len(noise)
            backward(loss + module.semantics_weight * semantics)
