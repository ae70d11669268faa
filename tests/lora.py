"""Build adapters of every class on a tiny pipeline."""

from pathlib import Path

import torch

from fairness_dft.adapters.base import Adapter
from fairness_dft.adapters.combined import Combined
from fairness_dft.adapters.lora import TextEncoderLoRA, UNetLoRA
from fairness_dft.adapters.prompt_prefix import PromptPrefix
from fairness_dft.diffusion.stable_diffusion import StableDiffusion

PROMPTS = ["a chef", "a nurse", ""]


def load(folder: Path, **options) -> StableDiffusion:
    model = StableDiffusion(str(folder), "DDIMScheduler", **options)
    model.load()
    return model


def predict(model: StableDiffusion) -> torch.Tensor:
    """Return the prediction for each prompt, in which every network and so every adapter takes part."""
    noise = model.noise(torch.arange(len(PROMPTS)))
    return model.denoise(noise, torch.tensor(500), model.encode(PROMPTS))


def randomize(adapter: Adapter, std: float = 0.3) -> None:
    for name in ("trained", "ema"):
        for tensor in adapter.tensors(name).values():
            torch.nn.init.normal_(tensor, std=std)


EXPORTED = {
    "text_encoder": lambda: TextEncoderLoRA(rank=3),
    "text_encoder_alpha": lambda: TextEncoderLoRA(rank=3, alpha=1.5),
    "mlp": lambda: TextEncoderLoRA(rank=3, target_modules=["fc1", "fc2"]),
    "attention": lambda: TextEncoderLoRA(rank=3, alpha=1.5, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]),
    "unet": lambda: UNetLoRA(rank=3),
    "unet_alpha": lambda: UNetLoRA(rank=3, alpha=1.5, target_modules=["to_q", "to_out.0", "ff.net.2"]),
    "strength": lambda: Combined([TextEncoderLoRA(rank=2, strength=1.5), UNetLoRA(rank=3, alpha=2.0, strength=0.5)]),
    "both": lambda: Combined([TextEncoderLoRA(rank=2, alpha=1.0), UNetLoRA(rank=3)]),
    "prefix": lambda: PromptPrefix(),
    "one_token": lambda: PromptPrefix(length=1, token="<balanced>"),
    "all": lambda: Combined([TextEncoderLoRA(rank=2), UNetLoRA(rank=3), PromptPrefix(length=2)]),
}
