"""The interface of an attribute classifier h: face crops in, logits of each head out."""

from abc import ABC, abstractmethod

from torch import Tensor

from fairness_dft.networks.frozen import FrozenNetwork


class AttributeClassifier(FrozenNetwork, ABC):
    """A frozen classifier with one head for each attribute; `_load` fills `heads`.

    Attributes:
        heads: Class names of each attribute, in the order of the logits; empty until loaded.
    """

    what = "classifier"

    def __init__(self) -> None:
        super().__init__()
        self.heads: dict[str, tuple[str, ...]] = {}

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Classify face crops, differentiably.

        Args:
            images: Face crops, with shape (N, 3, h, w), in [0, 1].

        Returns:
            Logits of each head, with shape (N, K).
        """
