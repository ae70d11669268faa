"""Frozen text-to-image models: encode a prompt, denoise with guidance, decode."""

from fairness_dft.diffusion.any_pipeline import AnyPipeline
from fairness_dft.diffusion.stable_diffusion import StableDiffusion
from fairness_dft.diffusion.text_to_image import TextToImage

__all__ = ["AnyPipeline", "StableDiffusion", "TextToImage"]
