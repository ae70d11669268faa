"""The interface of an attribute classifier h: face crops in, logits of each head out."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class AttributeClassifier(nn.Module, ABC):
    """A frozen classifier with one head for each attribute.

    Attributes:
        heads: class names of each attribute, in the order of the logits; empty until loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads: dict[str, tuple[str, ...]] = {}

    @abstractmethod
    def load(self) -> None:
        """Load the weights, freeze them and fill `heads`; the constructor loads nothing."""

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Classify, differentiably.

        Args:
            images: face crops, with shape (N, 3, h, w), in [0, 1].

        Returns:
            Logits of each head, with shape (N, K).
        """

    def train(self, mode: bool = True) -> "AttributeClassifier":
        """Stay in evaluation mode: the classifier is never trained here."""
        return super().train(False)
