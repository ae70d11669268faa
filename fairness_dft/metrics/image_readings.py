"""What a classifier reads in each single image, gathered over batches and ranks like the counts."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


@dataclass(frozen=True)
class Readings:
    """What a classifier reads in the images of one model, by prompt and, within a prompt, in the order of the images.

    Attributes:
        prompt: Index of the prompt, int64 with shape (N,).
        seed: Noise seed, or number in a folder, int64 with shape (N,).
        has_face: Whether the image shows a face, bool with shape (N,).
        boxes: Face regions in pixels (left, top, right, bottom), float with shape (N, 4).
        probabilities: Probability of each class, by attribute, float with shape (N, K).
    """

    prompt: Tensor
    seed: Tensor
    has_face: Tensor
    boxes: Tensor
    probabilities: dict[str, Tensor]


class ImageReadings(Metric):
    """Keeps what one classifier reads in each image of one model.

    Args:
        classes: Number of classes K of each attribute.

    Example:
        >>> metric = ImageReadings({"gender": 2})
        >>> metric.update(
        ...     prompt_index=0,
        ...     seeds=torch.tensor([7, 8]),
        ...     has_face=torch.tensor([True, False]),
        ...     boxes=torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 0.0, 0.0]]),
        ...     probabilities={"gender": torch.tensor([[0.9, 0.1], [0.5, 0.5]])},
        ... )
        >>> metric.readings().probabilities["gender"].argmax(1).tolist()
        [0, 0]
    """

    is_differentiable = False
    full_state_update = False

    rows: list[Tensor]
    numbers: list[Tensor]

    def __init__(self, classes: dict[str, int]) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("rows", [], dist_reduce_fx="cat")  # prompt, seed, face
        self.add_state("numbers", [], dist_reduce_fx="cat")  # box and probabilities

    def update(
        self, prompt_index: int, seeds: Tensor, has_face: Tensor, boxes: Tensor, probabilities: dict[str, Tensor]
    ) -> None:
        """Add the images of one prompt.

        Args:
            prompt_index: Index of the prompt.
            seeds: Noise seed of each image, int64 with shape (n,).
            has_face: Whether the image shows a face, bool with shape (n,).
            boxes: Face regions, with shape (n, 4).
            probabilities: Probability of each class, by attribute, with shape (n, K).
        """
        index = torch.full_like(seeds, prompt_index)
        self.rows.append(torch.stack([index, seeds, has_face.long()], 1))
        columns = [boxes, *(probabilities[name] for name in self.classes)]
        self.numbers.append(torch.cat([column.float() for column in columns], 1))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return both tables, with shapes (N, 3) and (N, 4 + ΣK); use ``readings`` for names."""
        return dim_zero_cat(self.rows), dim_zero_cat(self.numbers)

    def readings(self) -> Readings:
        """Return what was kept of all ranks, on the CPU; every rank must call it."""
        rows, numbers = (table.cpu() for table in self.compute())
        rows, numbers = rows.reshape(-1, 3), numbers.reshape(len(rows.reshape(-1, 3)), -1)
        # Ranks come one after the other; within a prompt, the first rank has the first images.
        order = rows[:, 0].argsort(stable=True)
        rows, (boxes, *parts) = rows[order], numbers[order].split_with_sizes([4, *self.classes.values()], 1)
        probabilities = dict(zip(self.classes, parts, strict=True))
        return Readings(rows[:, 0], rows[:, 1], rows[:, 2].bool(), boxes, probabilities)
