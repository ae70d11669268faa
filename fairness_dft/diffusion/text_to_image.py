"""The interface of a text-to-image model: encode a prompt, denoise with guidance, decode."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class TextToImage(nn.Module, ABC):
    """A frozen text-to-image diffusion model.

    Attributes:
        scheduler: A diffusers scheduler. It is a template: whoever samples works on a copy, as it has a
            state.
        latent_shape: The shape (C, h, w) of one latent.
        prefix: Text that `encode` puts before every prompt but the empty one.
        trainable: Whether it can be finetuned; if not, it is only looked at.
    """

    scheduler: Any
    latent_shape: tuple[int, int, int]
    prefix: str = ""
    trainable = True

    def check(self) -> None:  # noqa: B027  a model that needs nothing from outside is always there
        """Refuses a model that cannot be loaded, without loading it.

        Raises:
            ValueError: If the model is not within reach.
        """

    @abstractmethod
    def load(self) -> None:
        """Loads the weights; the constructor only takes notes. A second call does nothing."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encodes prompts P, truncated to what the text encoder reads.

        Args:
            prompts: The B prompts; the empty prompt is ∅.

        Returns:
            The conditioning c, with shape (B, L, D).
        """

    def truncated_text(self, prompt: str) -> str:
        """Returns the end of a prompt that the text encoder does not read, as it is too long; empty if it reads all."""
        return ""

    @abstractmethod
    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: Tensor) -> Tensor:
        """Calls the denoising network once.

        Args:
            latents: The latents z_t as the scheduler scales them for the network, with shape (B, C, h, w).
            timestep: The training timestep t, a scalar, or one a row, with shape (B,).
            conditioning: The conditioning c, with shape (B, L, D), or (P, L, D) where P divides B: then the first
                B / P latents share the first row, and so on.

        Returns:
            The prediction ε(z_t, c), with the shape and dtype of `latents`.

        Raises:
            ValueError: If P does not divide B.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes final latents z_0.

        Args:
            latents: The latents, with shape (B, C, h, w).

        Returns:
            The images x, with shape (B, 3, H, W), in [0, 1], in the dtype of `latents`. A pixel that is
            clamped passes no gradient.
        """

    def guided(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Tensor,
        unconditional: Tensor,
        guidance_scale: float,
    ) -> Tensor:
        """Denoises with classifier-free guidance, in one call of twice the batch, or of once where s = 1.

        Args:
            latents: As for `denoise`.
            timestep: As for `denoise`.
            conditioning: As for `denoise`.
            unconditional: The conditioning of the empty prompt ∅, with the same shape.
            guidance_scale: The scale s.

        Returns:
            The guided prediction ε_t, with the shape of `latents`.
        """
        if guidance_scale == 1:
            return self.denoise(latents, timestep, conditioning)
        both = self.denoise(torch.cat((latents, latents)), timestep, torch.cat((unconditional, conditioning)))
        without, with_prompt = both.chunk(2)
        return without + guidance_scale * (with_prompt - without)

    def denoiser_learns(self) -> bool:
        """Whether anything in the denoising network itself is trained, not only what leads to its conditioning."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def noise(self, seeds: Tensor) -> Tensor:
        """Draws initial latents z_T ~ N(0, I), the same for the same seed on any device and in any batch.

        Args:
            seeds: The seeds, with shape (n,), integer.

        Returns:
            The latents, with shape (n, C, h, w), in float32, on the device of the model.
        """
        noise = torch.empty(len(seeds), *self.latent_shape)
        for latent, seed in zip(noise, seeds.tolist(), strict=True):
            latent.normal_(generator=torch.Generator().manual_seed(seed))
        return noise.to(next(self.parameters()).device)

    def train(self, mode: bool = True) -> "TextToImage":
        """Stays in evaluation mode: a frozen model has no dropout to switch on."""
        return super().train(False)
