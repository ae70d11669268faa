"""Any text-to-image pipeline of diffusers, to be looked at as it is: SDXL, Stable Diffusion 3, Flux and so on.

    python -m fairness_dft.evaluate … --model.generator fairness_dft.diffusion.AnyPipeline \
      --model.generator.init_args.path stabilityai/stable-diffusion-xl-base-1.0

Finetuning needs to see inside the sampler, for which there is `diffusion.StableDiffusion`.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from fairness_dft.diffusion.diffusers_model import loading_error
from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.files import on_hub, one_line, quiet, resolve


class AnyPipeline(TextToImage):
    """A pipeline of diffusers with its own scheduler, that draws and is not finetuned.

    Args:
        path: folder or hub id.
        weights_dtype: data type of its weights.
        resolution: width and height of its images in pixels; its own by default.
        images_at_once: how many images of a prompt it draws at a time.
    """

    trainable = False

    def __init__(
        self,
        path: str,
        weights_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        resolution: int | None = None,
        images_at_once: int = 8,
    ) -> None:
        super().__init__()
        if images_at_once < 1:
            raise ValueError(f"`images_at_once` must be at least 1, but got {images_at_once}")
        self.path, self.resolution, self.images_at_once = path, resolution, images_at_once
        self.weights_dtype = getattr(torch, weights_dtype)
        self.pipeline: Any = None

    @override
    def check(self) -> None:
        from diffusers import DiffusionPipeline

        folder = resolve(self.path)
        self.source = str(folder) if folder.is_dir() else self.path
        self.options = {"local_files_only": folder.is_dir() or not on_hub(self.path)}
        try:
            with quiet():
                DiffusionPipeline.load_config(self.source, **self.options)
        except Exception as error:  # each library raises its own
            raise ValueError(loading_error(self.path, one_line(error))) from error

    @override
    def load(self) -> None:
        """Loads the pipeline; a safety checker, which would replace pictures by black ones, is left out."""
        if self.pipeline is not None:
            return
        self.check()
        from diffusers import AutoPipelineForText2Image

        weights = {"torch_dtype": self.weights_dtype, "use_safetensors": True}
        try:
            with quiet():
                self.pipeline = AutoPipelineForText2Image.from_pretrained(self.source, **weights, **self.options)
        except Exception as error:
            raise ValueError(loading_error(self.path, one_line(error))) from error
        if hasattr(self.pipeline, "safety_checker"):
            self.pipeline.safety_checker = None
        self.pipeline.set_progress_bar_config(disable=True)
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def draw(self, prompt: str, seeds: Tensor, steps: int, guidance_scale: float) -> Tensor:
        """Images of a prompt.

        Args:
            prompt: the text.
            seeds: of their noise, with shape (n,).
            steps: sampling steps.
            guidance_scale: of classifier-free guidance.

        Returns:
            With shape (n, 3, H, W), in [0, 1], float32.
        """
        size = {} if self.resolution is None else {"height": self.resolution, "width": self.resolution}
        drawn = []
        settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt", **size}
        for some in seeds.split(self.images_at_once):
            noises = [torch.Generator().manual_seed(seed) for seed in some.tolist()]
            drawn.append(self.pipeline(prompt=[prompt] * len(some), generator=noises, **settings).images)
        return torch.cat(drawn).float().clamp(0, 1)

    @override
    def encode(self, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError("a pipeline is only drawn with")

    @override
    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: Tensor) -> Tensor:
        raise NotImplementedError("a pipeline is only drawn with")

    @override
    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError("a pipeline is only drawn with")
