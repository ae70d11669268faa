"""The miniature networks that see how alike portraits are: a CLIP and a DINO stand-in.

Both learn from balanced draws, one half as drawn and one half through the autoencoder.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2ForImageClassification

from fairness_dft.portraits.draw import SIZE
from fairness_dft.portraits.heads import ATTRIBUTES, accuracies, head_losses, id2label
from fairness_dft.portraits.text_to_image import half_reconstructed, text_config, tokenize
from fairness_dft.portraits.training import LOOK, count_parameters, draw_portraits, optimise, save_network


def augment(images: Tensor, noise: float = 0.03) -> Tensor:
    """Images in [0, 1] to network input in [-1, 1], with jittered brightness, shift by up to 2 px, and noise.

    Args:
        images: With shape (n, 3, 64, 64).
        noise: The largest standard deviation of the noise.
    """
    n = len(images)
    dx, dy = torch.randint(-2, 3, (2,)).tolist()
    brightness = 1 + 0.08 * torch.randn(n, 1, 1, 1)
    grain = noise * torch.rand(n, 1, 1, 1) * torch.randn_like(images)
    return (images.roll((dx, dy), (-1, -2)) * brightness + grain).clamp(0, 1) * 2 - 1


def train_clip(autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path, scale: float) -> dict[str, object]:
    """Train a small CLIPModel on pictures and captions, with the usual symmetric contrastive loss."""
    portraits = half_reconstructed(draw_portraits(int(32_000 * scale), 31, balanced=True), autoencoder)
    torch.manual_seed(31)
    vision: dict[str, int] = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4)
    vision |= dict(image_size=SIZE, patch_size=8, projection_dim=64)
    model = CLIPModel(CLIPConfig(text_config=text_config(tokenizer).to_dict(), vision_config=vision, projection_dim=64))
    tokens = tokenize(tokenizer, portraits.captions)
    steps = int(2_800 * scale)

    def loss(step: int) -> Tensor:
        index = torch.randint(len(portraits), (128,))
        logits = model(input_ids=tokens[index], pixel_values=augment(portraits.images(index))).logits_per_image
        same = torch.arange(len(index))
        return (cross_entropy(logits, same) + cross_entropy(logits.T, same)) / 2

    seconds = optimise("CLIP", [model], loss, steps, 1e-3, 31, weight_decay=0.05)
    save_network(model, folder)
    tokenizer.save_pretrained(folder)
    test = draw_portraits(1_000, 32, balanced=True)
    with torch.no_grad():
        out = model(input_ids=tokenize(tokenizer, test.captions), pixel_values=test.images(slice(None)) * 2 - 1)
    match = (out.image_embeds @ out.text_embeds.T).argsort(1, descending=True)[:, :10]
    found = (match == torch.arange(len(test))[:, None]).any(1).float().mean().item()
    cosine = (out.image_embeds * out.text_embeds).sum(1).mean().item()
    return {
        "parameters": count_parameters(model),
        "steps": steps,
        "seconds": round(seconds),
        "recall_at_10_of_1000": round(found, 4),
        "cosine_of_true_pairs": round(cosine, 4),
    }


def train_dino(autoencoder: AutoencoderKL, folder: Path, scale: float) -> dict[str, object]:
    """Train the DINO stand-in: a small Dinov2Model, supervised by everything a portrait shows."""
    portraits = half_reconstructed(draw_portraits(int(24_000 * scale), 41, balanced=True), autoencoder)
    torch.manual_seed(41)
    sizes: dict[str, Any] = dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2)
    heads = ATTRIBUTES | LOOK
    sizes |= dict(image_size=SIZE, patch_size=8, id2label=id2label(heads))
    model = Dinov2ForImageClassification(Dinov2Config(**sizes))
    steps = int(4_000 * scale)

    def loss(step: int) -> Tensor:
        index = torch.randint(len(portraits), (64,))
        labels = {head: values[index] for head, values in portraits.labels.items()}
        return head_losses(model(augment(portraits.images(index))).logits, labels, heads)

    seconds = optimise("DINO stand-in", [model], loss, steps, 1e-3, 41, weight_decay=0.05)
    save_network(model.dinov2, folder)
    test = draw_portraits(1_000, 42, balanced=True)
    accuracy = accuracies(model, test.images(slice(None)), test.labels, heads)
    parameters = count_parameters(model.dinov2)
    return {"parameters": parameters, "steps": steps, "seconds": round(seconds), "accuracy_drawn": accuracy}
