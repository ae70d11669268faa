"""The generator: a frozen text-to-image diffusion model behind four verbs.

    c = encode(P),    ε(z_t, c) = denoise(z_t, t, c),    x = decode(z_0),

and classifier-free guidance, which pushes the prediction away from that of the empty prompt ∅,

    ε_t = ε(z_t, ∅) + s (ε(z_t, c) - ε(z_t, ∅)).

In the code P is `prompts`, c and ∅ are `conditioning` and `unconditional`, z_t is `latents`, s is
`guidance_scale`, ε is what the network predicts (noise or velocity: only the scheduler needs to know), and x
is `images`.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022).
    https://arxiv.org/abs/2112.10752
    Classifier-Free Diffusion Guidance (Ho and Salimans, 2022). https://arxiv.org/abs/2207.12598
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from fairness_dft.diffusion.diffusers_model import (
    find_scheduler,
    has_trained_weights,
    loading_error,
    native_precision,
    weight_dtype,
)
from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.files import on_hub, quiet, resolve
from fairness_dft.networks.cross_attention import share_keys
from fairness_dft.networks.frozen_layers import forget_inputs, join_activations

PARTS = {"scheduler", "tokenizer", "text_encoder", "unet", "vae"}  # of a model


class StableDiffusion(TextToImage):
    """Stable Diffusion 1.x or 2.x, or any model in the same layout.

    Args:
        path: A folder in the layout of `StableDiffusionPipeline`, relative to the working directory or to the
            repository, or the name of a model on the Hugging Face hub.
        scheduler: The class name of any diffusers scheduler; its settings are those stored with the model.
        resolution: The height and width of the images, in pixels; that of the model's training by default.
        weights_dtype: The precision in which the frozen weights are kept, whatever they are stored in.
        compile: Whether `torch.compile` compiles the transformer blocks of the U-Net. Their first calls take minutes
            then; another batch (of more than one) or number of steps does not compile them again. Needs a C++ compiler.

    Raises:
        ValueError: If `weights_dtype` is none of those allowed, or there is nothing to compile with.
    """

    def __init__(
        self,
        path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        scheduler: str = "DPMSolverMultistepScheduler",
        resolution: int | None = None,
        weights_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        compile: bool = False,
    ) -> None:
        super().__init__()
        if weights_dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"`weights_dtype` must be float32, float16 or bfloat16, but got {weights_dtype!r}")
        compilers = os.environ.get("CXX", "c++"), "g++", "clang++", "cl"
        if compile and not any(map(shutil.which, compilers)):
            raise ValueError("`compile` needs a C++ compiler, but found none: install g++, or leave `compile` out")
        self.path = path
        self.scheduler_name = scheduler
        self.resolution = resolution
        self.weights_dtype = getattr(torch, weights_dtype)
        self.compiled = compile

    def check(self) -> None:
        """Reads the settings of the scheduler, the smallest file of a model.

        Raises:
            ValueError: If the scheduler is unknown or the model is not within reach.
        """
        scheduler_class = find_scheduler(self.scheduler_name)
        folder = resolve(self.path)
        self.source = str(folder) if folder.is_dir() else self.path
        self.reachable = folder.is_dir() or on_hub(self.path)
        self.options = {"local_files_only": folder.is_dir() or not self.reachable}
        self._check_layout(folder)
        with self._loading():
            settings = scheduler_class.load_config(self.source, subfolder="scheduler", **self.options)
        # As `StableDiffusionPipeline` does: latents are not pixels, and are not clipped as if they were.
        settings |= {"clip_sample": False} if "clip_sample" in signature(scheduler_class).parameters else {}
        self.scheduler = scheduler_class.from_config(settings)
        if self.scheduler.config.get("thresholding"):
            raise ValueError(
                f"the scheduler of {self.path!r} has `thresholding`, which is for models of pixels: set it to false in "
                "scheduler_config.json"
            )

    def _check_layout(self, folder: Path) -> None:
        """Refuses a model with other parts, of which its index tells where it has one."""
        from diffusers import DiffusionPipeline

        if folder.is_dir() and not (folder / DiffusionPipeline.config_name).is_file():
            return
        with self._loading():
            index = DiffusionPipeline.load_config(self.source, **self.options)
        parts = {name for name, part in index.items() if isinstance(part, list) and part[0]}
        if not parts >= PARTS or "text_encoder_2" in parts:
            raise ValueError(
                f"{self.path!r} is a {index.get('_class_name')}, but must be a StableDiffusionPipeline, as Stable "
                "Diffusion 1.5 and 2.1 are; others are only audited, by "
                "--model.generator fairness_dft.diffusion.AnyPipeline"
            )

    def load(self) -> None:
        """Loads the scheduler, tokenizer, text encoder, U-Net and VAE, and freezes them.

        Raises:
            ValueError: If the scheduler is unknown, the model cannot be loaded or the resolution does not fit.
        """
        if hasattr(self, "unet"):
            return
        self.check()
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        source, options = self.source, self.options
        weights = {**options, "torch_dtype": self.weights_dtype, "use_safetensors": True}
        with self._loading():
            self.tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **options)
            # Where transformers finds no vocabulary, it makes one of special tokens alone.
            if len(self.tokenizer) <= 3:
                raise OSError(f"no vocabulary in the sub-folder tokenizer of {source}")
            self.text_encoder = CLIPTextModel.from_pretrained(source, subfolder="text_encoder", **weights)
            self.vae = AutoencoderKL.from_pretrained(source, subfolder="vae", **weights)
            self.unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet", **weights)
        self.latent_shape = (self.vae.config.latent_channels, *self._latent_size())
        self.freeze()

    def freeze(self) -> None:
        """Freezes the networks, makes their calls cheap, and compiles transformer blocks if that was asked for."""
        self.requires_grad_(False).eval()
        for network in (self.vae, self.unet):
            network.to(memory_format=torch.channels_last)  # convolutions are faster so
            forget_inputs(network)
        join_activations(self.vae)
        share_keys(self.unet)
        if self.compiled:
            # Blocks of three widths, with and without a graph, adapter on and off: dynamo's own limit is 8.
            torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
            self.unet.compile_repeated_blocks(dynamic=True)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Turns whatever goes wrong while loading into one line; each library and file format raises its own."""
        try:
            with quiet():
                yield
        except Exception as error:
            reason = str(error) if self.reachable else "no such folder, nor within reach on the Hugging Face hub"
            raise ValueError(loading_error(self.path, reason)) from error

    def _latent_size(self) -> tuple[int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if self.resolution is None:
            return (self.unet.config.sample_size,) * 2
        if self.resolution < factor or self.resolution % factor:
            raise ValueError(f"`resolution` must be a multiple of {factor} for this model, but got {self.resolution}")
        return (self.resolution // factor,) * 2

    @override
    def encode(self, prompts: Sequence[str]) -> Tensor:
        config = self.text_encoder.config
        tokens = self.tokenizer(
            [self.prefix + prompt if prompt else "" for prompt in prompts],
            padding="max_length",
            max_length=self._longest,
            truncation=True,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        mask = tokens.attention_mask if getattr(config, "use_attention_mask", False) else None
        return self.text_encoder(tokens.input_ids, attention_mask=mask).last_hidden_state

    @property
    def _longest(self) -> int:
        """The number of tokens that the text encoder reads, start and end included."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    @override
    def truncated_text(self, prompt: str) -> str:
        tokens = self.tokenizer(self.prefix + prompt, add_special_tokens=False, verbose=False).input_ids
        return self.tokenizer.decode(tokens[self._longest - 2 :]).strip()

    @override
    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: Tensor) -> Tensor:
        if len(latents) % len(conditioning):
            raise ValueError(f"{len(conditioning)} rows of `conditioning` cannot serve {len(latents)} latents alike")
        dtype = weight_dtype(self.unet)
        with native_precision(self.unet):
            prediction = self.unet(latents.to(dtype), timestep, encoder_hidden_states=conditioning.to(dtype)).sample
        # The recursion of the scheduler stays in the precision of the latents.
        return prediction.to(latents.dtype)

    @override
    def denoiser_learns(self) -> bool:
        return has_trained_weights(self.unet)

    @override
    def decode(self, latents: Tensor) -> Tensor:
        with native_precision(self.vae):
            images = self.vae.decode(latents.to(weight_dtype(self.vae)) / self.vae.config.scaling_factor).sample
        return (images.to(latents.dtype) / 2 + 0.5).clamp(0, 1)
