"""Where the faces are: images in, face crops and a mask out.

A face finder says which images show a face, where the largest one is, and gives its crop, differentiable with
respect to the image. Detectors join `FaceFinder`; `WholeFrame` is for models that draw nothing but faces.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Faces:
    """The largest face of each image.

    Attributes:
        crops: face crops, float with shape (N, 3, h, w), in [0, 1]; any content where there is no face.
        boxes: left, top, right, bottom of the face region in pixels of the image, float with shape (N, 4).
        mask: whether the image shows a face, bool with shape (N,).
    """

    crops: Tensor
    boxes: Tensor
    mask: Tensor


class FaceFinder(nn.Module, ABC):
    """Finds the largest face of each image."""

    def load(self) -> None:  # noqa: B027  a finder without weights has nothing to load
        """Load weights; the constructor loads nothing."""

    @abstractmethod
    def forward(self, images: Tensor) -> Faces:
        """Find faces.

        Args:
            images: with shape (N, 3, H, W), in [0, 1].
        """


class WholeFrame(FaceFinder):
    """Takes every image for a face that fills the frame."""

    def forward(self, images: Tensor) -> Faces:
        """The images themselves, all of them marked as faces."""
        present = torch.ones(len(images), dtype=torch.bool, device=images.device)
        return Faces(images, whole_frame_boxes(images), present)


def whole_frame_boxes(images: Tensor) -> Tensor:
    """Boxes that cover the frame, with shape (N, 4)."""
    height, width = images.shape[-2:]
    return images.new_tensor([0, 0, width, height]).expand(len(images), 4)
