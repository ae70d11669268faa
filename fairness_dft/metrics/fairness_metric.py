"""torchmetrics that count classes per prompt, and pairs of classes before and after."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from fairness_dft.metrics.bias import BiasSummary, check_classes, summarize_bias


class FairnessMetric(Metric):
    """Class frequencies and bias of one attribute, accumulated over prompts, batches and ranks.

    The states are sums, so that the value does not depend on how images are spread over batches and ranks.

    Args:
        classes: the names of the K classes, at least 2.
        prompts: the number of prompts that the metric will see.

    Raises:
        ValueError: if there are fewer than two classes or no prompt.
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
        """Counts images of one prompt.

        Args:
            prompt_index: which prompt the images were made from, in [0, prompts).
            classes: the class of each image, with shape (n,), integer in [0, K) where there is a face.
            face: whether an image shows a face, with shape (n,), bool.

        Raises:
            ValueError: if an argument is not as described.
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
        """Sums up what was seen; see ``BiasSummary``."""
        return summarize_bias(self.counts, self.no_face, self.classes)


class PairMetric(Metric):
    """How images of the same noise are read before and after, accumulated over prompts, batches and ranks.

    Args:
        classes: the number of classes K.
        prompts: the number of prompts that the metric will see.
    """

    is_differentiable = False
    full_state_update = False

    pairs: Tensor

    def __init__(self, classes: int, prompts: int) -> None:
        super().__init__()
        self.states = classes + 1
        self.add_state("pairs", torch.zeros(prompts, classes + 1, classes + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prompt_index: int, before: Tensor, before_face: Tensor, after: Tensor, after_face: Tensor) -> None:
        """Counts images of one prompt; see ``FairnessMetric.update`` for each side."""
        none = self.states - 1
        rows, columns = (torch.where(face, of, none) for of, face in ((before, before_face), (after, after_face)))
        counts = torch.bincount(rows.long() * self.states + columns.long(), minlength=self.states**2)
        self.pairs[prompt_index] += counts.reshape(self.states, self.states)

    def compute(self) -> Tensor:
        """Numbers of images by prompt, class before and class after, with shape (P, K + 1, K + 1); the last is none."""
        return self.pairs
