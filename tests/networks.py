"""Build image networks with random weights in the exact layout of the real ones, small enough for a test."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny import tiny_tokenizer
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

LABELS = ("gender/man", "gender/woman", "race/light", "race/tan", "race/brown", "race/dark", "face/absent")
LABELS += ("face/present", "age/young", "age/old", "occupation/chef", "occupation/pilot", "occupation/judge")
PREPROCESSOR = {
    "size": {"height": 16, "width": 16},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def build_classifier(folder: Path, labels: Sequence[str] = LABELS, seed: int = 0) -> Path:
    """Save a ResNet for 16 px images whose logits differ visibly between images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResNetForImageClassification(
            ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16],
                depths=[1, 1],
                layer_type="basic",
                id2label=dict(enumerate(labels)),
                num_labels=len(labels),
            )
        )
        for parameter in network.classifier.parameters():
            torch.nn.init.normal_(parameter)
    return save(network, folder)


def build_clip(folder: Path) -> Path:
    """Save a CLIP with one layer per tower and a tokenizer that reads letter by letter."""
    tokenizer = tiny_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_factor": 4.0,
    }
    vision = tower | {"image_size": 16, "patch_size": 8, "initializer_factor": 4.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    tokenizer.save_pretrained(folder)
    return save(network, folder)


def build_dino(folder: Path) -> Path:
    """Save a DINOv2 with one layer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = Dinov2Model(Dinov2Config(**sizes, image_size=16, patch_size=8, initializer_range=0.2))
    return save(network, folder)


def save(network: PreTrainedModel, folder: Path) -> Path:
    """Save a network with the preprocessing of 16 px images."""
    network.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR), encoding="utf-8")
    return folder
