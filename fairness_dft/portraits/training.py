"""What every miniature network shares: a seeded training loop with a progress bar, pictures as tensors, saving."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel

from fairness_dft.portraits.draw import BACKGROUNDS, CLOTHES, COLOURS, HEADWEAR, SIZE
from fairness_dft.portraits.world import Portrait, stream, subjects

# What a subject's look decides, part by part.
LOOK = {"background": BACKGROUNDS, "clothes": CLOTHES, "headwear": HEADWEAR}
LOOK |= {f"{part}_colour": tuple(COLOURS) for part in ("background", "clothes", "headwear")}


@dataclass
class Portraits:
    """A drawn data set held in memory.

    Attributes:
        pictures: uint8, with shape (N, 3, 64, 64).
        captions: N captions.
        labels: For each of gender, race, age, face, subject and the parts of its look (`LOOK`) the class index,
            int64 with shape (N,).
        boxes: Left, top, right, bottom of the face in pixels, with shape (N, 4); zeros where no face is seen.
    """

    pictures: Tensor
    captions: list[str]
    labels: dict[str, Tensor] = field(repr=False)
    boxes: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, index: Tensor | slice) -> Tensor:
        """Return some of the images as floats, with shape (n, 3, 64, 64), in [0, 1]."""
        return self.pictures[index].float() / 255


def draw_portraits(count: int, seed: int, balanced: bool = False) -> Portraits:
    """Draw a data set; see `world.sample`."""
    pictures = np.empty((count, 64, 64, 3), np.uint8)
    boxes = np.zeros((count, 4), np.float32)
    portraits: list[Portrait] = []
    for i, (portrait, drawing) in enumerate(stream(count, seed, balanced)):
        pictures[i] = drawing.picture
        portraits.append(portrait)
        if drawing.box is not None:
            boxes[i] = drawing.box
    labels = {name: torch.tensor([p.label[name] for p in portraits]) for name in portraits[0].label}
    labels |= look_labels(labels["subject"])
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    return Portraits(tensor, [p.caption for p in portraits], labels, torch.from_numpy(boxes))


def look_labels(subject: Tensor) -> dict[str, Tensor]:
    """Return the parts that the subjects' looks decide: per part of `LOOK` a class index, shaped like `subject`."""
    return {
        part: torch.tensor([kinds.index(getattr(each.look, part)) for each in subjects()])[subject]
        for part, kinds in LOOK.items()
    }


def optimise(
    name: str,
    modules: Sequence[nn.Module],
    loss: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    seed: int,
    weight_decay: float = 1e-2,
    average: float = 0.0,
) -> float:
    """Minimise `loss(step)` over the modules' parameters by AdamW with warm-up and cosine decay.

    Args:
        name: Shown beside the progress bar.
        modules: What is trained; left in evaluation mode.
        loss: a scalar loss for a step; draws its own batch from torch's global generator.
        steps: Number of optimizer steps.
        learning_rate: The peak, reached after 3 % of the steps.
        seed: Seeds torch's global generator.
        weight_decay: Of AdamW.
        average: Decay of an exponential moving average of the weights, which replaces them at the end; 0 for none.

    Returns:
        Seconds taken.
    """
    torch.manual_seed(seed)
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in parameters] if average else []
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    # It moves β1 too, from 0.95 through 0.85 and back.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.03)
    for module in modules:
        module.train()
    started, shown = time.monotonic(), None
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=steps)
        for step in range(steps):
            value = loss(step)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if averages:
                decay = min(average, (1 + step) / (10 + step))
                torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
            shown = value.item() if shown is None else 0.98 * shown + 0.02 * value.item()
            progress.update(bar, advance=1, description=f"{name}  loss {shown:.4f}")
    if averages:
        torch._foreach_copy_([p.data for p in parameters], averages)
    for module in modules:
        module.eval()
    return time.monotonic() - started


def save_half(model: nn.Module, folder: Path) -> None:
    """Save a diffusers or transformers model in half precision and safetensors; in memory it is rounded to that too."""
    dtype = next(model.parameters()).dtype
    cast(PreTrainedModel | ModelMixin, model.half()).save_pretrained(folder, safe_serialization=True)
    model.to(dtype)


def preprocessor(size: int = SIZE) -> dict[str, object]:
    """Return the preprocessor_config.json of a network for images of this size."""
    return {
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def save_network(model: nn.Module, folder: Path, size: int = SIZE) -> None:
    """Save in half precision with the preprocessing it expects."""
    save_half(model, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor(size), indent=1) + "\n")


def count_parameters(*modules: nn.Module) -> int:
    """Return the number of parameters of some modules together."""
    return sum(p.numel() for module in modules for p in module.parameters())
