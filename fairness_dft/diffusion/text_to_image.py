"""The interface of a text-to-image model: encode a prompt, denoise with guidance, decode."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fairness_dft.networks.frozen import FrozenNetwork


class TextToImage(FrozenNetwork, ABC):
    """A frozen text-to-image diffusion model.

    Attributes:
        scheduler: A diffusers scheduler. It is a template: because a scheduler has a state, samplers work on a copy.
        latent_shape: The shape (C, h, w) of one latent.
        prefix: Text that `encode` puts before every prompt except the empty one.
        trainable: Whether the model can be finetuned; if not, it can only be audited.
    """

    what = "text-to-image model"
    scheduler: Any
    latent_shape: tuple[int, int, int]
    prefix: str = ""
    trainable = True

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts P, truncated to the length that the text encoder reads.

        Args:
            prompts: B prompts; the empty prompt is ∅.

        Returns:
            The conditioning c, with shape (B, L, D).
        """

    def truncated_text(self, prompt: str) -> str:
        """Return the end of a prompt that is too long for the text encoder, or an empty text if it reads all of it."""
        return ""

    @abstractmethod
    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: Tensor) -> Tensor:
        """Call the denoising network once.

        Args:
            latents: Latents z_t as the scheduler scales them for the network, with shape (B, C, h, w).
            timestep: Training timestep t, a scalar, or one per row, with shape (B,).
            conditioning: Conditioning c, with shape (B, L, D), or (P, L, D) where P divides B: then the first
                B / P latents share the first row, and so on.

        Returns:
            The prediction ε(z_t, c), with the shape and dtype of `latents`.

        Raises:
            ValueError: If P does not divide B.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode final latents z_0.

        Args:
            latents: Latents z_0, with shape (B, C, h, w).

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
        """Denoise with classifier-free guidance, in one call with twice the batch, or with the batch alone if s = 1.

        Args:
            latents: Latents z_t, as for `denoise`.
            timestep: Training timestep t, as for `denoise`.
            conditioning: Conditioning c, as for `denoise`.
            unconditional: Conditioning of the empty prompt ∅, with the shape of `conditioning`.
            guidance_scale: Scale s.

        Returns:
            The guided prediction ε_t, with the shape of `latents`.
        """
        if guidance_scale == 1:
            return self.denoise(latents, timestep, conditioning)
        both = self.denoise(torch.cat((latents, latents)), timestep, torch.cat((unconditional, conditioning)))
        without, with_prompt = both.chunk(2)
        return without + guidance_scale * (with_prompt - without)

    def denoiser_learns(self) -> bool:
        """Return whether weights of the denoising network itself are trained, not only those of its conditioning."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def noise(self, seeds: Tensor) -> Tensor:
        """Draw initial latents z_T ~ N(0, I), the same for the same seed on any device and in any batch.

        Args:
            seeds: Seeds of the noise, with shape (n,), integer.

        Returns:
            The latents, with shape (n, C, h, w), in float32, on the device of the model.
        """
        noise = torch.empty(len(seeds), *self.latent_shape)
        for latent, seed in zip(noise, seeds.tolist(), strict=True):
            latent.normal_(generator=torch.Generator().manual_seed(seed))
        return noise.to(next(self.parameters()).device)
