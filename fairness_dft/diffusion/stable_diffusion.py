"""A frozen Stable Diffusion: a text encoder, a U-Net and a decoder.

    c = encode(P),    ε(z_t, c) = denoise(z_t, t, c),    x = decode(z_0),

and classifier-free guidance, which moves the prediction away from that of the empty prompt ∅,

    ε_t = ε(z_t, ∅) + s (ε(z_t, c) - ε(z_t, ∅)).

In the code, P is `prompts`, c and ∅ are `conditioning` and `unconditional`, z_t is `latents` and s is
`guidance_scale`. ε is the prediction of the network, noise or velocity: only the scheduler needs to know which. x is
`images`.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022).
    https://arxiv.org/abs/2112.10752
    Classifier-Free Diffusion Guidance (Ho and Salimans, 2022). https://arxiv.org/abs/2207.12598
"""

import os
import shutil
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fairness_dft.diffusion.diffusers_model import (
    DiffusersModel,
    Precision,
    find_scheduler,
    has_trained_weights,
    native_precision,
    token_limit,
    weight_dtype,
)
from fairness_dft.files import Location, quiet
from fairness_dft.networks.cross_attention import share_keys
from fairness_dft.networks.frozen_layers import forget_inputs, join_activations

PARTS = {"scheduler", "tokenizer", "text_encoder", "unet", "vae"}  # that every Stable Diffusion has


def downsampling(block_out_channels: Sequence[int]) -> int:
    """Return how many pixels wide one latent is, as each block of the autoencoder except the last halves the image."""
    return int(2 ** (len(block_out_channels) - 1))


class StableDiffusion(DiffusersModel):
    """Stable Diffusion 1.x or 2.x, or any model in the same layout.

    Args:
        path: Folder in the layout of `StableDiffusionPipeline`, relative to the working directory or to the
            repository, or name of a model on the Hugging Face hub.
        scheduler: Class name of any diffusers scheduler; its settings are those stored with the model.
        resolution: Height and width of the images, in pixels; by default those of the model's training.
        weights_dtype: Precision of the frozen weights in memory, whatever precision their files have.
        compile: Whether to compile the transformer blocks of the U-Net with `torch.compile`. The first calls then take
            minutes; a different batch size (above one) or number of steps does not compile them again. Needs a C++
            compiler.

    Raises:
        ValueError: If `weights_dtype` is not one of the allowed values, or there is no compiler for `compile`.

    Example:
        >>> model = StableDiffusion("data/portraits/pipeline")
        >>> model.load()
        >>> latents, conditioning = model.noise(torch.tensor([0, 1])), model.encode(["a chef"])
        >>> model.denoise(latents, torch.tensor(500), conditioning).shape
        torch.Size([2, 4, 8, 8])
        >>> model.decode(latents).shape
        torch.Size([2, 3, 64, 64])
    """

    layout = "Stable Diffusion"
    required_files = ("scheduler/scheduler_config.json",)

    def __init__(
        self,
        path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        scheduler: str = "DPMSolverMultistepScheduler",
        resolution: int | None = None,
        weights_dtype: Precision = "float32",
        compile: bool = False,
    ) -> None:
        super().__init__(path, weights_dtype, resolution)
        compilers = os.environ.get("CXX", "c++"), "g++", "clang++", "cl"
        if compile and not any(map(shutil.which, compilers)):
            raise ValueError("`compile` needs a C++ compiler, but there is none: install g++, or leave `compile` out")
        self.scheduler_name = scheduler
        self.compiled = compile

    @override
    def _check(self, location: Location) -> None:
        find_scheduler(self.scheduler_name)
        self._check_layout(location)
        self._build_scheduler(location)
        self._check_resolution(location)

    def _check_resolution(self, location: Location) -> None:
        """Reject a resolution that the decoder cannot have."""
        from diffusers import AutoencoderKL

        if self.resolution is None:
            return
        with self._reading(location):
            config = AutoencoderKL.load_config(location.source, subfolder="vae", **location.options)
            factor = downsampling(config["block_out_channels"])
        if self.resolution < factor or self.resolution % factor:
            raise ValueError(f"`resolution` must be a multiple of {factor} for this model, but got {self.resolution}")

    def _check_layout(self, location: Location) -> None:
        """Reject a model whose index, if it has one, lists other parts."""
        from diffusers import DiffusionPipeline

        if location.folder is not None and not (location.folder / DiffusionPipeline.config_name).is_file():
            return
        index = self._read_index(location)
        parts = {name for name, part in index.items() if isinstance(part, list) and part[0]}
        if not parts >= PARTS or "text_encoder_2" in parts:
            raise ValueError(
                f"{self.path!r} is a {index.get('_class_name')}, but must be a StableDiffusionPipeline, such as Stable "
                "Diffusion 1.5 and 2.1; other pipelines can only be audited, with "
                "--model.generator fairness_dft.diffusion.AnyPipeline"
            )

    def _build_scheduler(self, location: Location) -> Any:
        """Build the scheduler from the settings stored with the model.

        Raises:
            ValueError: If the settings cannot be read, or are those of a model of pixels.
        """
        scheduler_class = find_scheduler(self.scheduler_name)
        with self._reading(location):
            settings = scheduler_class.load_config(location.source, subfolder="scheduler", **location.options)
        # As `StableDiffusionPipeline` does: latents are not pixels and must not be clipped like pixels.
        settings |= {"clip_sample": False} if "clip_sample" in signature(scheduler_class).parameters else {}
        scheduler = scheduler_class.from_config(settings)
        if scheduler.config.get("thresholding"):
            raise ValueError(
                f"the scheduler of {self.path!r} has `thresholding`, which is for models of pixels: set it to false in "
                "scheduler_config.json"
            )
        return scheduler

    @override
    def _load(self, location: Location) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        self.scheduler = self._build_scheduler(location)
        source, weights = location.source, self._weights(location)
        load_vae: Any = AutoencoderKL.from_pretrained
        load_unet: Any = UNet2DConditionModel.from_pretrained
        with quiet():
            self.tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **location.options)
            # Without a vocabulary file, transformers builds one of special tokens alone.
            if len(self.tokenizer) <= 3:
                raise OSError(f"no vocabulary in the sub-folder tokenizer of {source}")
            self.text_encoder = CLIPTextModel.from_pretrained(source, subfolder="text_encoder", **weights)
            self.vae = load_vae(source, subfolder="vae", **weights)
            self.unet = load_unet(source, subfolder="unet", **weights)
        self.latent_shape = (self.vae.config.latent_channels, *self._latent_size())
        self.freeze()

    def freeze(self) -> None:
        """Freeze the networks, make their calls cheap, and compile the transformer blocks if requested."""
        self.requires_grad_(False).eval()
        for network in (self.vae, self.unet):
            network.to(memory_format=torch.channels_last)  # convolutions are faster this way
            forget_inputs(network)
        join_activations(self.vae)
        share_keys(self.unet)
        if self.compiled:
            # Blocks of three widths, with and without a graph, adapter on and off: dynamo's own limit is 8.
            torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
            self.unet.compile_repeated_blocks(dynamic=True)

    def _latent_size(self) -> tuple[int, int]:
        if self.resolution is None:
            return (self.unet.config.sample_size,) * 2
        return (self.resolution // downsampling(self.vae.config.block_out_channels),) * 2

    @override
    def encode(self, prompts: Sequence[str]) -> Tensor:
        config = self.text_encoder.config
        tokens = self.tokenizer(
            [self.prefix + prompt if prompt else "" for prompt in prompts],
            padding="max_length",
            max_length=token_limit(self.tokenizer, self.text_encoder),
            truncation=True,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        mask = tokens.attention_mask if getattr(config, "use_attention_mask", False) else None
        states: Tensor = self.text_encoder(tokens.input_ids, attention_mask=mask).last_hidden_state
        return states

    @override
    def truncated_text(self, prompt: str) -> str:
        tokens = self.tokenizer(self.prefix + prompt, add_special_tokens=False, verbose=False).input_ids
        end = self.tokenizer.decode(tokens[token_limit(self.tokenizer, self.text_encoder) - 2 :])
        return str(end).strip()

    @override
    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: Tensor) -> Tensor:
        if len(latents) % len(conditioning):
            raise ValueError(
                f"{len(conditioning)} rows of `conditioning` cannot be shared equally by {len(latents)} latents"
            )
        dtype = weight_dtype(self.unet)
        with native_precision(self.unet):
            output = self.unet(latents.to(dtype), timestep, encoder_hidden_states=conditioning.to(dtype))
            prediction: Tensor = output.sample
        # The recursion of the scheduler stays in the precision of the latents.
        return prediction.to(latents.dtype)

    @override
    def denoiser_learns(self) -> bool:
        return has_trained_weights(self.unet)

    @override
    def decode(self, latents: Tensor) -> Tensor:
        with native_precision(self.vae):
            output = self.vae.decode(latents.to(weight_dtype(self.vae)) / self.vae.config.scaling_factor)
            images: Tensor = output.sample
        return (images.to(latents.dtype) / 2 + 0.5).clamp(0, 1)
