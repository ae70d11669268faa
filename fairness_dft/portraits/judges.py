"""The miniature networks that look at portraits: two attribute classifiers, a CLIP and a DINO stand-in.

All of them train on balanced draws, one half as drawn and one half through the autoencoder, so that they read what
the generator decodes and cannot guess an attribute from an occupation. The two classifiers differ in architecture,
draws and seed: one trains the generator, the other only ever judges it.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fairness_dft.portraits.draw import AGES, GENDERS, SIZE, SKINS
from fairness_dft.portraits.text_to_image import reconstruct, text_config, tokenize
from fairness_dft.portraits.training import Portraits, count_parameters, draw_portraits, optimise, save_half
from fairness_dft.portraits.world import occupations
from fairness_dft.preprocessing import Preprocessing

ATTRIBUTES = {"gender": GENDERS, "race": SKINS, "age": AGES, "face": ("absent", "present")}
COARSE = SIZE // 2  # what the training classifier sees


def preprocessor(size: int = SIZE) -> dict:
    """What preprocessor_config.json says of a network that sees pictures of this size."""
    return {
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def heads(with_occupation: bool) -> dict[str, tuple[str, ...]]:
    """The classes of each head, in the order of the logits."""
    return ATTRIBUTES | ({"occupation": tuple(job.name for job in occupations())} if with_occupation else {})


def id2label(with_occupation: bool) -> dict[int, str]:
    """Hugging Face's flat label list for several heads: "gender/woman", "race/dark", ..."""
    names = [f"{head}/{name}" for head, classes in heads(with_occupation).items() for name in classes]
    return dict(enumerate(names))


def half_reconstructed(portraits: Portraits, autoencoder: AutoencoderKL) -> Portraits:
    """Put every second picture through the autoencoder, in place."""
    decoded = reconstruct(autoencoder, portraits.images(slice(0, None, 2)))
    portraits.pictures[::2] = (decoded * 255).round().to(torch.uint8)
    return portraits


def augment(images: Tensor, noise: float = 0.03) -> Tensor:
    """Images in [0, 1] to network input in [-1, 1], with jittered brightness, shift by up to 2 px, and noise.

    Args:
        images: with shape (n, 3, 64, 64).
        noise: the largest standard deviation of the noise.
    """
    n = len(images)
    dx, dy = torch.randint(-2, 3, (2,)).tolist()
    brightness = 1 + 0.08 * torch.randn(n, 1, 1, 1)
    grain = noise * torch.rand(n, 1, 1, 1) * torch.randn_like(images)
    return (images.roll((dx, dy), (-1, -2)) * brightness + grain).clamp(0, 1) * 2 - 1


def augment_coarse(images: Tensor, noise: float = 0.5) -> Tensor:
    """The same at half the size and under strong noise.

    So trained, a classifier's gradient follows what is seen rather than single pixels (Santurkar et al., 2019,
    https://arxiv.org/abs/1906.09453), and finetuning learns from that gradient.

    Args:
        images: with shape (n, 3, 64, 64).
        noise: the largest standard deviation of the noise.
    """
    coarse = Preprocessing((COARSE, COARSE), [0.0] * 3, [1.0] * 3)(augment(images, noise=0.0))
    return coarse + 2 * noise * torch.rand(len(images), 1, 1, 1) * torch.randn_like(coarse)


def head_losses(logits: Tensor, labels: dict[str, Tensor], with_occupation: bool, smoothing: float = 0.0) -> Tensor:
    """Sum of the heads' cross-entropies; gender, race and age count only where there is a face."""
    total, start = logits.new_zeros(()), 0
    for head, classes in heads(with_occupation).items():
        part = logits[:, start : start + len(classes)]
        start += len(classes)
        seen = labels["face"] == 1 if head in ("gender", "race", "age") else slice(None)
        total = total + cross_entropy(part[seen], labels[head][seen], label_smoothing=smoothing)
    return total


def accuracies(
    model: PreTrainedModel, images: Tensor, labels: dict[str, Tensor], with_occupation: bool, size: int = SIZE
) -> dict:
    """Accuracy of each head, in [0, 1]; gender, race and age where there is a face, occupation likewise."""
    prepare = Preprocessing((size, size), [0.5] * 3, [0.5] * 3)
    with torch.no_grad():
        logits = torch.cat([model(prepare(chunk)).logits for chunk in images.split(256)])
    figures, start, face = {}, 0, labels["face"] == 1
    for head, classes in heads(with_occupation).items():
        right = logits[:, start : start + len(classes)].argmax(1) == labels[head]
        start += len(classes)
        figures[head] = round((right if head == "face" else right[face]).float().mean().item(), 4)
    return figures


def supervise(
    model: nn.Module,
    name: str,
    portraits: Portraits,
    steps: int,
    rate: float,
    seed: int,
    with_occupation: bool,
    prepare: Callable[[Tensor], Tensor] = augment,
    smoothing: float = 0.0,
) -> float:
    """Train an image classifier on all heads; returns seconds."""

    def loss(step: int) -> Tensor:
        index = torch.randint(len(portraits), (64,))
        logits = model(prepare(portraits.images(index))).logits
        labels = {head: values[index] for head, values in portraits.labels.items()}
        return head_losses(logits, labels, with_occupation, smoothing)

    return optimise(name, [model], loss, steps, rate, seed, weight_decay=0.05)


def train_classifier(which: str, autoencoder: AutoencoderKL, folder: Path, scale: float) -> dict:
    """Train the "training" (ResNet) or the "evaluation" (ViT) classifier, test it on held-out draws, save it."""
    seed, held_out = {"training": (11, 12), "evaluation": (21, 22)}[which]
    with_occupation = which == "evaluation"
    portraits = half_reconstructed(draw_portraits(int(16_000 * scale), seed, balanced=True), autoencoder)
    torch.manual_seed(seed)
    labels = {"num_labels": len(id2label(with_occupation)), "id2label": id2label(with_occupation)}
    if which == "training":
        sizes = dict(embedding_size=24, hidden_sizes=[24, 48, 96], depths=[1, 1, 1], layer_type="basic")
        model: PreTrainedModel = ResNetForImageClassification(ResNetConfig(**sizes, **labels))
        steps, rate, size = int(2_500 * scale), 3e-3, COARSE
        robust = {"prepare": augment_coarse, "smoothing": 0.05}
    else:
        sizes = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192)
        model = ViTForImageClassification(ViTConfig(**sizes, **labels, image_size=SIZE, patch_size=8))
        steps, rate, size, robust = int(4_000 * scale), 1e-3, SIZE, {}
    seconds = supervise(model, f"{which} classifier", portraits, steps, rate, seed, with_occupation, **robust)
    figures = {
        "architecture": type(model).__name__,
        "parameters": count_parameters(model),
        "steps": steps,
        "seconds": round(seconds),
    }
    save_network(model, folder, size)
    reloaded = type(model).from_pretrained(folder, torch_dtype=torch.float32).eval()
    test = draw_portraits(max(200, int(4_000 * scale)), held_out, balanced=True)
    drawn = test.images(slice(None))
    decoded = reconstruct(autoencoder, drawn)
    figures["accuracy_drawn"] = accuracies(reloaded, drawn, test.labels, with_occupation, size)
    figures["accuracy_reconstructed"] = accuracies(reloaded, decoded, test.labels, with_occupation, size)
    return figures


def train_clip(autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path, scale: float) -> dict:
    """Train a small CLIPModel on pictures and captions, with the usual symmetric contrastive loss."""
    portraits = half_reconstructed(draw_portraits(int(16_000 * scale), 31, balanced=True), autoencoder)
    torch.manual_seed(31)
    vision = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4)
    vision |= dict(image_size=SIZE, patch_size=8, projection_dim=64)
    model = CLIPModel(CLIPConfig(text_config=text_config(tokenizer).to_dict(), vision_config=vision, projection_dim=64))
    tokens = tokenize(tokenizer, portraits.captions)
    steps = int(2_500 * scale)

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


def train_dino(autoencoder: AutoencoderKL, folder: Path, scale: float) -> dict:
    """Train the DINO stand-in: a small Dinov2Model, supervised by everything a portrait shows."""
    portraits = half_reconstructed(draw_portraits(int(16_000 * scale), 41, balanced=True), autoencoder)
    torch.manual_seed(41)
    sizes = dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2)
    labels = dict(num_labels=len(id2label(True)), id2label=id2label(True))
    model = Dinov2ForImageClassification(Dinov2Config(**sizes, **labels, image_size=SIZE, patch_size=8))
    steps = int(3_000 * scale)
    seconds = supervise(model, "DINO stand-in", portraits, steps, 1e-3, 41, True)
    save_network(model.dinov2, folder)
    test = draw_portraits(1_000, 42, balanced=True)
    accuracy = accuracies(model, test.images(slice(None)), test.labels, True)
    parameters = count_parameters(model.dinov2)
    return {"parameters": parameters, "steps": steps, "seconds": round(seconds), "accuracy_drawn": accuracy}


def save_network(model: PreTrainedModel, folder: Path, size: int = SIZE) -> None:
    """Save in half precision with the preprocessing it expects."""
    save_half(model, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor(size), indent=1) + "\n")
