"""The two attribute classifiers of the portrait world, trained by `python -m fairness_dft.train_classifier`.

The one that finetuning learns from sees face crops at 32 pixels a side and is trained under strong noise; the one that
only ever evaluates sees whole pictures, has another architecture, other draws and another seed, and also says whether
a face is present and which subject is shown. Their settings are experiments/classifiers/portraits_*.yaml. Both learn
from balanced draws, one half as drawn and one half through the autoencoder, so that they read what the generator
decodes and cannot guess an attribute from a subject.
"""

import csv
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageClassification, PretrainedConfig, ResNetConfig, ViTConfig

from fairness_dft.datasets.base import SPLITS
from fairness_dft.faces.crops import square_crops
from fairness_dft.files import shipped
from fairness_dft.portraits.draw import SIZE
from fairness_dft.portraits.heads import (
    ATTRIBUTES,
    OF_A_FACE,
    OF_A_PERSON,
    Heads,
    accuracies,
    id2label,
    subjects_for_looks,
)
from fairness_dft.portraits.text_to_image import half_reconstructed, reconstruct
from fairness_dft.portraits.training import (
    LOOK,
    Portraits,
    count_parameters,
    draw_portraits,
    preprocessor,
    save_network,
)
from fairness_dft.train_classifier import main as train

CROP = 32  # side in pixels of the face crops that the training classifier sees
MARGIN = 0.5  # about the longer side of a face's box, as in fairness_dft.faces.DetectedFaces
EXPERIMENTS = shipped("experiments/classifiers")
SEEDS = {"training": 11, "evaluation": 21}  # of the training draws; those for validation and test have the next two
SIZES = {"training": CROP, "evaluation": SIZE}
FACE_HEADS: Heads = {head: ATTRIBUTES[head] for head in OF_A_FACE}
HEADS = {"training": FACE_HEADS, "evaluation": ATTRIBUTES | LOOK}


def architecture(which: str) -> PretrainedConfig:
    """Return the classifier's backbone: a ResNet for training, a ViT for evaluation."""
    labels = id2label(HEADS[which])
    if which == "training":
        sizes: dict[str, Any] = dict(embedding_size=24, hidden_sizes=[24, 48, 96], depths=[1, 1, 1], layer_type="basic")
        return ResNetConfig(**sizes, id2label=labels, architectures=["ResNetForImageClassification"])
    sizes = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192)
    sizes |= dict(image_size=SIZE, patch_size=8)
    return ViTConfig(**sizes, id2label=labels, architectures=["ViTForImageClassification"])


def views(portraits: Portraits, which: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the crops that a classifier sees, and their labels.

    Returns:
        Pictures, with shape (n, 3, side, side), in [0, 1]: the crops of all faces, or all portraits; and their labels.
    """
    images = portraits.images(slice(None))
    if which == "evaluation":
        return images, portraits.labels
    seen = portraits.labels["face"] == 1
    crops = square_crops(images[seen], portraits.boxes[seen], CROP, MARGIN)
    return crops, {head: labels[seen] for head, labels in portraits.labels.items()}


def write_pictures(folder: Path, which: str, autoencoder: AutoencoderKL, counts: dict[str, int]) -> None:
    """Write a folder of images with a labels.csv, for `fairness_dft.datasets.LabelledFolder`.

    Args:
        folder: To write to.
        which: The classifier, "training" or "evaluation".
        autoencoder: Of the miniature.
        counts: How many portraits to draw for each split.
    """
    heads, rows = HEADS[which], []
    for number, split in enumerate(SPLITS):
        portraits = draw_portraits(counts[split], SEEDS[which] + number, balanced=True)
        images, labels = views(half_reconstructed(portraits, autoencoder), which)
        for i, picture in enumerate((images * 255).round().byte().permute(0, 2, 3, 1).numpy()):
            file = f"{split}_{i}.png"
            Image.fromarray(picture).save(folder / file, compress_level=1)
            seen = bool(labels["face"][i])
            known = {head: seen or head not in OF_A_FACE + OF_A_PERSON for head in heads}
            names = {head: classes[int(labels[head][i])] if known[head] else "" for head, classes in heads.items()}
            rows.append({"file": file, "split": split, **names})
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, ["file", "split", *heads])
        writer.writeheader()
        writer.writerows(rows)


def train_classifier(which: str, autoencoder: AutoencoderKL, folder: Path, scale: float) -> dict[str, object]:
    """Train the "training" or the "evaluation" classifier, test it on held-out draws, save it into a folder."""
    counts = {split: max(600, int(count * scale)) for split, count in zip(SPLITS, (24_000, 4_000, 4_000), strict=True)}
    heads, size, started = HEADS[which], SIZES[which], time.monotonic()
    with TemporaryDirectory() as scratch:
        drawn, backbone, trained = (Path(scratch) / name for name in ("drawn", "backbone", "trained"))
        drawn.mkdir()
        write_pictures(drawn, which, autoencoder, counts)
        architecture(which).save_pretrained(backbone)
        (backbone / "preprocessor_config.json").write_text(json.dumps(preprocessor(size)), encoding="utf-8")
        settings = EXPERIMENTS / f"portraits_{which}.yaml"
        flags: dict[str, Path | int] = {"model.backbone": backbone, "data.init_args.folder": drawn, "output": trained}
        if scale < 1:
            flags["trainer.max_epochs"] = 1
        train([f"--config={settings}", *(f"--{flag}={value}" for flag, value in flags.items())])
        epochs = torch.load(trained / "training" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] + 1
        model = AutoModelForImageClassification.from_pretrained(trained, dtype=torch.float32).eval()
    seconds = time.monotonic() - started
    if which == "evaluation":
        model.classifier, heads = subjects_for_looks(model.classifier)
        model.config.id2label = id2label(heads)
        model.config.label2id = {name: i for i, name in model.config.id2label.items()}
        model.num_labels = model.config.num_labels
    save_network(model, folder, size)
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    test = draw_portraits(counts["test"], SEEDS[which] + 3, balanced=True)
    images, labels = views(test, which)
    test.pictures = (reconstruct(autoencoder, test.images(slice(None))) * 255).round().byte()
    return {
        "architecture": type(model).__name__,
        "parameters": count_parameters(model),
        "epochs": epochs,
        "seconds": round(seconds),
        "accuracy_drawn": accuracies(model, images, labels, heads, size),
        "accuracy_reconstructed": accuracies(model, views(test, which)[0], labels, heads, size),
    }
