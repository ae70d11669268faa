r"""Any text-to-image pipeline of diffusers, for audits only: SDXL, Stable Diffusion 3, Flux and so on.

    python -m fairness_dft.evaluate … --model.generator fairness_dft.diffusion.AnyPipeline \
      --model.generator.init_args.path stabilityai/stable-diffusion-xl-base-1.0

Finetuning needs access to the steps of the sampler, which `diffusion.StableDiffusion` has.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from fairness_dft.diffusion.diffusers_model import DiffusersModel, Precision
from fairness_dft.files import Location, quiet


class AnyPipeline(DiffusersModel):
    """Any diffusers pipeline with its own scheduler, for audits only; it cannot be finetuned.

    Args:
        path: Folder of the pipeline, or name on the Hugging Face hub.
        weights_dtype: Precision of the weights in memory.
        resolution: Height and width of the images, in pixels; by default those of the pipeline.
        images_at_once: Number of images of one prompt that are generated together.

    Raises:
        ValueError: If `images_at_once` is not positive, or `weights_dtype` is not one of the allowed values.

    Example:
        >>> model = AnyPipeline("data/portraits/pipeline")
        >>> model.load()
        >>> images = model.draw("a photo of the face of a chef", torch.tensor([0, 1]), steps=2, guidance_scale=1.75)
        >>> images.shape
        torch.Size([2, 3, 64, 64])
    """

    required_files = ("model_index.json",)
    trainable = False

    def __init__(
        self,
        path: str,
        weights_dtype: Precision = "float32",
        resolution: int | None = None,
        images_at_once: int = 8,
    ) -> None:
        super().__init__(path, weights_dtype, resolution)
        if images_at_once < 1:
            raise ValueError(f"`images_at_once` must be at least 1, but got {images_at_once}")
        self.images_at_once = images_at_once
        self.pipeline: Any = None

    @override
    def _check(self, location: Location) -> None:
        self._read_index(location)

    @override
    def _load(self, location: Location) -> None:
        from diffusers import AutoPipelineForText2Image

        with quiet():
            from_pretrained: Any = AutoPipelineForText2Image.from_pretrained
            self.pipeline = from_pretrained(location.source, **self._weights(location))
        if hasattr(self.pipeline, "safety_checker"):
            self.pipeline.safety_checker = None  # it would replace images by black ones, and an audit counts them
        self.pipeline.set_progress_bar_config(disable=True)
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)

    @torch.no_grad()
    def draw(self, prompt: str, seeds: Tensor, steps: int, guidance_scale: float) -> Tensor:
        """Generate images of a prompt.

        Args:
            prompt: Prompt P.
            seeds: Seeds of the initial noise, with shape (n,), integer.
            steps: Number of sampling steps.
            guidance_scale: Scale s of classifier-free guidance.

        Returns:
            The images x, with shape (n, 3, H, W), in [0, 1], float32.
        """
        size = {} if self.resolution is None else {"height": self.resolution, "width": self.resolution}
        images = []
        settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt", **size}
        for chunk in seeds.split(self.images_at_once):  # type: ignore[no-untyped-call]
            generators = [torch.Generator().manual_seed(seed) for seed in chunk.tolist()]
            images.append(self.pipeline(prompt=[prompt] * len(chunk), generator=generators, **settings).images)
        return torch.cat(images).float().clamp(0, 1)

    @override
    def encode(self, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError("an AnyPipeline generates whole images and cannot encode prompts")

    @override
    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: Tensor) -> Tensor:
        raise NotImplementedError("an AnyPipeline generates whole images and cannot denoise single steps")

    @override
    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError("an AnyPipeline generates whole images and cannot decode latents")
