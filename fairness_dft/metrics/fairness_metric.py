"""Torchmetrics that count classes of each prompt, and pairs of classes before and after finetuning."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from fairness_dft.metrics.bias import BiasSummary, check_classes, summarize_bias


class FairnessMetric(Metric):
    """Counts the classes of one attribute over prompts, batches and ranks, and returns their bias.

    The states are sums, so that the value does not depend on how images are spread over batches and ranks.

    Args:
        classes: Names of the K classes, at least 2.
        prompts: Number of prompts.

    Raises:
        ValueError: If there are fewer than two classes or no prompt.

    Example:
        >>> metric = FairnessMetric(("man", "woman"), prompts=1)
        >>> face = torch.tensor([True, True, True, True, False])
        >>> metric.update(0, classes=torch.tensor([0, 0, 0, 1, 0]), face=face)
        >>> summary = metric.compute()
        >>> summary.bias, summary.counts, summary.no_face
        (0.5, ((3, 1),), (1,))
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    counts: Tensor
    no_face: Tensor

    def __init__(self, classes: Sequence[str], prompts: int) -> None:
        super().__init__()
        check_classes(len(classes))
        if prompts < 1:
            raise ValueError(f"`prompts` must be at least 1, but got {prompts}")
        self.classes = tuple(classes)
        self.prompts = prompts
        self.add_state("counts", torch.zeros(prompts, len(classes), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("no_face", torch.zeros(prompts, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prompt_index: int, classes: Tensor, face: Tensor) -> None:
        """Count images of one prompt.

        Args:
            prompt_index: Index of the prompt, in [0, prompts).
            classes: Class of each image, with shape (n,), integer in [0, K) where there is a face.
            face: Whether an image shows a face, with shape (n,), bool.

        Raises:
            ValueError: If an argument is not as described.
        """
        if not 0 <= prompt_index < self.prompts:
            raise ValueError(f"`prompt_index` must be in [0, {self.prompts}), but got {prompt_index}")
        if classes.ndim != 1 or classes.shape != face.shape or face.dtype != torch.bool:
            raise ValueError(
                "`classes` and `face` must have the same shape (images,) and `face` must be bool, "
                f"but got {tuple(classes.shape)}, {tuple(face.shape)} and {face.dtype}"
            )
        visible = classes[face]
        if ((visible < 0) | (visible >= len(self.classes))).any():
            raise ValueError(
                f"`classes` must be in [0, {len(self.classes)}) where there is a face, but got {visible.tolist()}"
            )
        one_hot = torch.nn.functional.one_hot(visible.long(), len(self.classes))
        self.counts[prompt_index] += one_hot.sum(dim=0)
        self.no_face[prompt_index] += (~face).sum()

    def compute(self) -> BiasSummary:
        """Return the bias of everything counted; see ``BiasSummary``."""
        return summarize_bias(self.counts, self.no_face, self.classes)


class PairMetric(Metric):
    """Counts images of the same noise by their class before and after, over prompts, batches and ranks.

    Args:
        classes: Number of classes K.
        prompts: Number of prompts.

    Example:
        >>> metric, face = PairMetric(classes=2, prompts=1), torch.tensor([True, True])
        >>> metric.update(0, torch.tensor([0, 0]), face, torch.tensor([0, 1]), face)
        >>> metric.compute()[0, :2, :2].tolist()  # one image keeps its class, one changes
        [[1, 1], [0, 0]]
    """

    is_differentiable = False
    full_state_update = False

    pairs: Tensor

    def __init__(self, classes: int, prompts: int) -> None:
        super().__init__()
        self.states = classes + 1
        self.add_state("pairs", torch.zeros(prompts, classes + 1, classes + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prompt_index: int, before: Tensor, before_face: Tensor, after: Tensor, after_face: Tensor) -> None:
        """Count images of one prompt; see ``FairnessMetric.update`` for each side."""
        no_face = self.states - 1
        sides = ((before, before_face), (after, after_face))
        rows, columns = (torch.where(face, classes, no_face) for classes, face in sides)
        counts = torch.bincount(rows.long() * self.states + columns.long(), minlength=self.states**2)
        self.pairs[prompt_index] += counts.reshape(self.states, self.states)

    def compute(self) -> Tensor:
        """Return the number of images by prompt, class before and class after, with shape (P, K + 1, K + 1).

        The last row and column are images that show no face.
        """
        return self.pairs
