"""The network that becomes a classifier: any image classifier of Hugging Face, with new heads."""

from typing import Any

import torch
from torch import nn

from fairness_dft.files import Location, locate, quiet
from fairness_dft.networks.frozen import loading_error
from fairness_dft.networks.preprocessing import Preprocessing

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
BILINEAR = 2  # PIL.Image.Resampling.BILINEAR, as Hugging Face writes it


def backbone(path: str, pretrained: bool, heads: dict[str, tuple[str, ...]]) -> tuple[nn.Module, dict[str, Any]]:
    """Return an image classifier with new heads, and the content of its preprocessor_config.json.

    Args:
        path: Hub id or folder.
        pretrained: Whether to start from its weights.
        heads: The classes of each head.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    labels = dict(enumerate(f"{head}/{name}" for head, classes in heads.items() for name in classes))
    settings = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    location = locate(path)
    source, options = location.source, location.options
    try:
        pretrained = pretrained and has_weights(location)
        with quiet():
            config = AutoConfig.from_pretrained(source, **options, **settings)
            if pretrained:
                network = AutoModelForImageClassification.from_pretrained(
                    source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, **options
                )
            else:
                from_config: Any = AutoModelForImageClassification.from_config
                network = from_config(config, dtype=torch.float32)
        return network, preparation(source, config, options)
    except Exception as error:  # each file format raises its own
        allowed = "an image classifier of the Hugging Face hub where it can be reached, or a local folder"
        raise loading_error("backbone (--model.backbone)", path, error, allowed) from error


def has_weights(location: Location) -> bool:
    """Return whether a backbone brings weights; a local folder may hold a config.json alone.

    Raises:
        OSError: If its weights are pickled, which may run code.
    """
    if location.folder is None or any(location.folder.glob("*.safetensors")):
        return True
    if any(location.folder.glob("*.bin")):
        raise OSError("its weights are pickled: convert them to safetensors")
    return False


def preparation(source: str, config: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return a preprocessor_config.json: the backbone's or, without one, ImageNet's colors at its size or at 224 px.

    Args:
        source: Folder or hub id of the backbone.
        config: Its configuration.
        options: Options of its loaders.

    Raises:
        ValueError: If the backbone's file is broken, or its images are not square.
    """
    from transformers.utils.hub import cached_file

    file = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **options)
    if file is None:
        size, colors = getattr(config, "image_size", None) or 224, dict(IMAGENET)
        size = (size, size) if isinstance(size, int) else tuple(size)
    else:
        given = Preprocessing.from_file(file)
        size = given.size
        colors = {"image_mean": given.mean.flatten().tolist(), "image_std": given.deviation.flatten().tolist()}
    if size[0] != size[1]:
        raise ValueError(f"it reads images of {size[0]} x {size[1]} pixels, but must read square ones")
    return {
        "image_processor_type": "ViTImageProcessor",  # the plain one: resize, rescale, normalize
        "do_resize": True,
        "size": {"height": size[0], "width": size[1]},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **colors,
    }


def last_linear(network: nn.Module, side: int) -> nn.Linear:
    """Return the layer that gives a classifier's logits; freeze the parameters that do not reach them.

    Args:
        network: An image classifier.
        side: Side of its images in pixels.

    Raises:
        ValueError: If the logits do not come from one linear layer.
    """
    config: Any = network.config
    count = config.num_labels
    candidates = [
        module for module in network.modules() if isinstance(module, nn.Linear) and module.out_features == count
    ]
    network.eval()
    pictures = torch.rand(2, 3, side, side)
    before = network(pictures).logits
    before.sum().backward()
    for parameter in network.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)  # such as a mask token, for which DDP would wait forever
        parameter.grad = None
    with torch.no_grad():
        for layer in candidates:
            parameters = [p for p in (layer.weight, layer.bias) if p is not None]
            saved = [p.clone() for p in parameters]
            for p in parameters:
                p.mul_(0.5)
            halved = network(pictures).logits
            for p, values in zip(parameters, saved, strict=True):
                p.copy_(values)
            if torch.allclose(halved, before / 2, rtol=1e-3, atol=1e-5):
                return layer
    raise ValueError(
        f"--model.backbone: the logits of {type(network).__name__} do not come from one linear layer, which "
        "calibration needs; choose another image classifier"
    )
