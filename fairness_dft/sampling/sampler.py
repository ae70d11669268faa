"""The sampler: one differentiable loop for training and evaluation.

From z_T ~ N(0, I), for each of the T timesteps t of a scheduler,

    ε_t = ε(z_t, ∅) + s (ε(z_t, c) - ε(z_t, ∅)),    z_{t-1} = scheduler(z_t, ε_t, t),    x = decode(z_0).

In the code z_T is `noise`, z_t is `latents`, ε_t is `prediction`, s is `guidance_scale`, c and ∅ are
`conditioning` and `unconditional`. The loop carries a graph exactly where gradients are enabled: under
`torch.no_grad()` it only samples. Which steps carry gradient, and with what weight, is the business of
`fairness_dft.sampling.GradientPath`. With `checkpoint` such a step keeps only its latent and is computed again in
the backward pass, so memory grows with T by a latent, not by the activations of a U-Net: with detached latents by
`fairness_dft.sampling.replay`, else step by step. Without it all activations are kept, which takes less time.

References:
    Training Deep Nets with Sublinear Memory Cost (Chen et al., 2016). https://arxiv.org/abs/1604.06174
"""

import copy
import hashlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint as recompute
from typing_extensions import final

from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.networks.frozen_layers import keeping_activations
from fairness_dft.sampling.gradients import GradientPath, scale_gradient
from fairness_dft.sampling.replay import Call, replayed


def checkpointed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a deterministic `function` so that the backward pass computes its activations again."""
    return lambda *inputs: recompute(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class PromptEmbeddings(NamedTuple):
    """What a text encoder makes of prompts and of the empty prompt ∅: all that differs where nothing else is trained.

    Attributes:
        conditioning: The conditioning c, with shape (P, L, D), where P divides the number of images: then the first
            n / P images share the first row, and so on.
        unconditional: The conditioning of ∅, with the same shape.
    """

    conditioning: Tensor
    unconditional: Tensor


def encode_prompts(model: TextToImage, prompts: str | Sequence[str]) -> PromptEmbeddings:
    """Encode P prompts, or one that all images share, and the empty one."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if model.prefix:  # which the empty prompt does not have: by itself it has no graph of that
        conditioning, unconditional = model.encode(prompts), model.encode([""])
    else:
        conditioning, unconditional = model.encode([*prompts, ""]).tensor_split([-1])
    return PromptEmbeddings(conditioning, unconditional.expand_as(conditioning))


def rows_for(conditioning: Tensor, images: int, start: int, stop: int) -> Tensor:
    """Return the rows of a conditioning for images `start` to `stop`: shared rows where they fit."""
    each = images // len(conditioning)
    first, last = start // each, (stop - 1) // each
    served = {min(stop, (row + 1) * each) - max(start, row * each) for row in range(first, last + 1)}
    if len(served) == 1:
        return conditioning[first : last + 1]
    return conditioning[first : last + 1].repeat_interleave(each, 0)[start - first * each : stop - first * each]


def noise_sources(scheduler: Any, noise: Tensor) -> dict[str, list[Generator]]:
    """Return one random source per image for schedulers that draw noise at each step (ancestral, DDPM).

    Each is seeded by its image's initial noise, so that the same noise gives the same image, whatever else is
    sampled beside it, and models can be compared.

    Args:
        scheduler: A diffusers scheduler.
        noise: The initial latents, with shape (n, C, h, w).

    Returns:
        The keyword argument for `scheduler.step`; empty if the scheduler takes none.
    """
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    rows = [row.tobytes() for row in noise.detach().float().cpu().numpy()]
    seeds = [int.from_bytes(hashlib.blake2b(row, digest_size=7).digest(), "big") for row in rows]
    return {"generator": [Generator().manual_seed(seed) for seed in seeds]}


@final
class Sampler:
    """Generates images from prompts and noise, with or without a graph.

    Args:
        steps: The number of sampling steps T.
        steps_max: If given, the number of steps is drawn for each call, uniformly from `steps` to
            `steps_max`; the paper trains with 19 to 23.
        guidance_scale: The scale s of classifier-free guidance; 1 turns it off and halves the cost.
        gradient: The path of the gradient; the adjusted gradient by default.
        checkpoint: Whether to save memory by computing the activations of each step again in the backward
            pass.
        decode_chunk: The number of images that the decoder, or a feature network, works on at a time.
        decode_kept: With `checkpoint`, how many images' activations in the decoder are kept, in whole chunks, and not
            computed again; `decode_chunk` by default, as those of a chunk exist anyway in the backward pass.
        images_at_once: How many images the denoising network works on at a time at most; by default all, of all texts.
            With `checkpoint` and detached latents it is also how many rows, of one image at one step in one branch of
            guidance, are computed again at a time.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        steps: int = 20,
        steps_max: int | None = None,
        guidance_scale: float = 7.5,
        gradient: GradientPath | None = None,
        checkpoint: bool = True,
        decode_chunk: int = 8,
        images_at_once: int | None = None,
        decode_kept: int | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1, but got {steps}")
        if steps_max is not None and steps_max < steps:
            raise ValueError(f"`steps_max` must be at least `steps` ({steps}), but got {steps_max}")
        if decode_chunk < 1:
            raise ValueError(f"`decode_chunk` must be at least 1, but got {decode_chunk}")
        if images_at_once is not None and images_at_once < 1:
            raise ValueError(f"`images_at_once` must be at least 1, but got {images_at_once}")
        if decode_kept is not None and decode_kept < 0:
            raise ValueError(f"`decode_kept` must be at least 0, but got {decode_kept}")
        self.steps = steps
        self.steps_max = steps if steps_max is None else steps_max
        self.guidance_scale = guidance_scale
        self.gradient = gradient or GradientPath.adjusted()
        self.checkpoint = checkpoint
        self.decode_chunk = decode_chunk
        self.images_at_once = images_at_once
        self.decode_kept = decode_chunk if decode_kept is None else decode_kept

    def draw_steps(self, generator: Generator | None = None) -> int:
        """Draw a number of steps, from `steps` to `steps_max`; calls to be compared must share one draw."""
        return int(torch.randint(self.steps, self.steps_max + 1, (), generator=generator))

    def __call__(
        self,
        model: TextToImage,
        prompts: str | Sequence[str],
        noise: Tensor,
        steps: int | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """Generate one image for each row of `noise`.

        Args:
            model: The text-to-image model, loaded.
            prompts: One prompt P for all images, or one for each of the n images.
            noise: The initial latents z_T ~ N(0, I), with shape (n, C, h, w).
            steps: The number of sampling steps T; by default drawn by `draw_steps`.
            generator: A CPU random generator that draws the number of steps and the steps that carry
                gradient; the global one by default. It does not touch the images otherwise.

        Returns:
            The images x, with shape (n, 3, H, W), in [0, 1]. They carry a graph if gradients are enabled.

        Raises:
            ValueError: If there are several prompts, but not one for each image.
        """
        if not isinstance(prompts, str) and len(prompts) not in (1, len(noise)):
            raise ValueError(f"`prompts` must be one, or one for each of the {len(noise)} images; got {len(prompts)}")
        [latents] = self.sample(model, [encode_prompts(model, prompts)], noise, steps, generator)
        return self.decode(model, latents)

    def sample(
        self,
        model: TextToImage,
        texts: Sequence[PromptEmbeddings],
        noise: Tensor,
        steps: int | None = None,
        generator: Generator | None = None,
    ) -> list[Tensor]:
        """Sample from the same noise with each of several texts, in the same calls of the network that have no graph.

        These are all calls with `checkpoint` and detached latents, else those of steps that carry no gradient. Where
        models differ in what they read alone, as the finetuned and the original one may, this takes less time than one
        model after the other.

        Args:
            model: The text-to-image model, loaded.
            texts: What each model reads of the prompts, all with the same shape.
            noise: As in `__call__`, with shape (n, C, h, w).
            steps: As in `__call__`.
            generator: As in `__call__`.

        Returns:
            The final latents z_0 of each text, with shapes (n, C, h, w). The first ones carry a graph if gradients are
            enabled, the others never.

        Raises:
            ValueError: If the rows of a text cannot serve the images alike.
        """
        if any(len(noise) % len(text.conditioning) for text in texts):
            raise ValueError(f"`texts` must have 1 or {len(noise)} rows, or as many as divide the {len(noise)} images")
        steps = self.draw_steps(generator) if steps is None else steps
        images = len(noise)
        noise = noise.repeat(len(texts), *[1] * (noise.ndim - 1))

        scheduler = copy.deepcopy(model.scheduler)  # it keeps the history of its multistep solver
        scheduler.set_timesteps(steps)  # on the CPU, where its lookups do not make a GPU wait
        timesteps = scheduler.timesteps.to(noise.device)  # and here, so that none is copied within the loop
        replays = self.checkpoint and not self.gradient.coupled and torch.is_grad_enabled()
        weights = self._weights(model.scheduler, steps, len(scheduler.timesteps), replays, generator)
        calls: list[Call] = []

        sources = noise_sources(scheduler, noise)
        latents = noise * scheduler.init_noise_sigma
        for t, timestep, weight in zip(scheduler.timesteps, timesteps, weights, strict=True):
            inputs = scheduler.scale_model_input(latents, t)
            if replays and weight is not None:
                calls.append(Call(inputs[:images], timestep, weight))
            prediction = self._predict(model, inputs, timestep, texts, None if replays else weight)
            latents = scheduler.step(prediction, t, latents, **sources).prev_sample
        found, *others = latents.split(images)
        if replays:
            rows = self.images_at_once or images
            found = replayed(found, calls, model, *texts[0], self.guidance_scale, rows)
        return [found, *(latents.detach() for latents in others)]

    def decode(self, model: TextToImage, latents: Tensor) -> Tensor:
        """Decode final latents z_0, with shape (n, C, h, w), to images x, with shape (n, 3, H, W), in [0, 1]."""
        with nullcontext() if self.checkpoint else keeping_activations():
            return self.map_chunks(model.decode, latents, self.decode_kept)

    def map_chunks(self, function: Callable[[Tensor], Tensor], inputs: Tensor, kept: int = 0) -> Tensor:
        """Apply a frozen network, such as the decoder, to `decode_chunk` rows at a time.

        Where activations are computed again (`checkpoint`), those of one chunk exist at a time, plus those kept.

        Args:
            function: A deterministic function that treats each row by itself.
            inputs: The inputs, such as latents or images, with shape (n, ...).
            kept: How many rows' activations may be kept, in whole chunks. They are those of the last chunks, which come
                first on the way back; until then they are there beside those of what comes after.

        Returns:
            What `function(inputs)` returns, with shape (n, ...).
        """
        again, parts = self._wrap(function), inputs.split(self.decode_chunk)  # type: ignore[no-untyped-call]
        from_here = [len(inputs) - i * self.decode_chunk for i in range(len(parts))]  # rows of this chunk and all after
        each = zip(parts, from_here, strict=True)
        return torch.cat([function(part) if rows <= kept else again(part) for part, rows in each])

    def _weights(
        self, scheduler: Any, steps: int, total: int, replays: bool, generator: Generator | None
    ) -> list[float | None]:
        """Return the factor of the gradient for each step; None for a step without gradient.

        That is the gradient at its prediction ε_t, or where steps are replayed the gradient at the final latent z_0.
        """
        if not torch.is_grad_enabled():
            return [None] * total
        selected = self.gradient.select(total, generator).tolist()
        if replays:
            weights = self.gradient.weights_from_final_latent(scheduler, steps)
        else:
            weights = self.gradient.scales(scheduler, steps)
        return [weight if carries else None for carries, weight in zip(selected, weights.tolist(), strict=True)]

    def _predict(
        self,
        model: TextToImage,
        latents: Tensor,
        timestep: Tensor,
        texts: Sequence[PromptEmbeddings],
        scale: float | None,
    ) -> Tensor:
        """Predict the guided noise ε_t, with a graph for the first text only; without any if `scale` is None."""
        total = len(latents)
        if scale is not None and len(texts) > 1:
            first, others = latents.tensor_split([total // len(texts)])
            predictions = self._predict(model, first, timestep, texts[:1], scale)
            return torch.cat((predictions, self._predict(model, others, timestep, texts[1:], None)))
        if scale is not None and not self.gradient.coupled:
            latents = latents.detach()
        guided: Callable[..., Tensor] = model.guided if scale is None else self._wrap(model.guided)
        both = texts[0] if len(texts) == 1 else list(map(torch.cat, zip(*texts, strict=True)))
        parts, found, start = -(-total // (self.images_at_once or total)), [], 0
        with torch.set_grad_enabled(scale is not None):
            for part in latents.tensor_split(parts):
                rows = (rows_for(tensor, total, start, start + len(part)) for tensor in both)
                found.append(guided(part, timestep, *rows, self.guidance_scale))
                start += len(part)
        prediction = torch.cat(found)
        return prediction if scale is None else scale_gradient(prediction, scale)

    def _wrap(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return checkpointed(function) if self.checkpoint else function
