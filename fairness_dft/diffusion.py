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
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from fairness_dft.cross_attention import share_keys
from fairness_dft.frozen_layers import forget_inputs, join_activations
from fairness_dft.loading import on_hub, quiet, resolve


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

    def unread(self, prompt: str) -> str:
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
                "--model.generator fairness_dft.any_pipeline.AnyPipeline"
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
            raise ValueError(cannot_load(self.path, reason)) from error

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
    def unread(self, prompt: str) -> str:
        tokens = self.tokenizer(self.prefix + prompt, add_special_tokens=False, verbose=False).input_ids
        return self.tokenizer.decode(tokens[self._longest - 2 :]).strip()

    @override
    def denoise(self, latents: Tensor, timestep: Tensor, conditioning: Tensor) -> Tensor:
        if len(latents) % len(conditioning):
            raise ValueError(f"{len(conditioning)} rows of `conditioning` cannot serve {len(latents)} latents alike")
        dtype = _dtype(self.unet)
        with _own_precision(self.unet):
            prediction = self.unet(latents.to(dtype), timestep, encoder_hidden_states=conditioning.to(dtype)).sample
        # The recursion of the scheduler stays in the precision of the latents.
        return prediction.to(latents.dtype)

    @override
    def denoiser_learns(self) -> bool:
        return _learns(self.unet)

    @override
    def decode(self, latents: Tensor) -> Tensor:
        with _own_precision(self.vae):
            images = self.vae.decode(latents.to(_dtype(self.vae)) / self.vae.config.scaling_factor).sample
        return (images.to(latents.dtype) / 2 + 0.5).clamp(0, 1)


def _own_precision(network: Any) -> AbstractContextManager:
    """Within, a network that is frozen in half precision computes in it.

    Autocast would change its tensors to single precision and back around each normalisation, which takes time and
    memory and gains nothing where weights are rounded already. Learned weights, which are in single precision, need it.
    """
    if _dtype(network) not in (torch.float16, torch.bfloat16) or _learns(network):
        return nullcontext()
    return torch.autocast(next(network.parameters()).device.type, enabled=False)


def _dtype(network: nn.Module) -> torch.dtype:
    """The data type of its weights, without a walk through all modules, which diffusers' own `dtype` takes."""
    return next(network.parameters()).dtype


def _learns(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())


def find_scheduler(name: str) -> Any:
    """Returns the diffusers scheduler class of that name.

    Raises:
        ValueError: If there is none.
    """
    import diffusers

    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        usual = "DPMSolverMultistepScheduler, DDIMScheduler or EulerDiscreteScheduler"
        raise ValueError(f"`scheduler` must be the name of a diffusers scheduler, such as {usual}, but got {name!r}")
    return found


def cannot_load(path: str, reason: str) -> str:
    """Says in one line which model could not be loaded, why, and how to go on."""
    reason = (reason.strip() or "unknown reason").splitlines()[0].rstrip(".")
    local = resolve(path).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path)
    download = "" if local else f"Download it where there is a network (`hf download {path}`), or give"
    return (
        f"Could not load the text-to-image model {path!r} ({reason}). "
        f"{download or 'Give'} a local folder in the layout of Stable Diffusion "
        "(--model.generator.init_args.path FOLDER), or run on the miniature that ships with this repository "
        "(--config experiments/parts/portraits.yaml)."
    )
