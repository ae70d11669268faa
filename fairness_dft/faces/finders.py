"""Where the faces are: images in, face crops and a mask out.

A face finder says which images show a face, where the largest one is, and crops it, differentiably in the image.
`DetectedFaces` asks detectors one after the other until one detects a face; `WholeFrame` is for models that generate
nothing but faces. The location of a face gives two crops:

    square     side (1 + margin) max(width, height) around the center of the box, for classifiers
    aligned    eyes, nose and corners of the mouth at fixed positions in 112 x 112 pixels, for face embeddings

The landmarks are these five, in this order, left and right as seen in the image.

References:
    Finetuning Text-to-Image Diffusion Models for Fairness (Shen et al., 2024), appendix on face finding,
    https://arxiv.org/abs/2311.07604
    ArcFace (Deng et al., 2019), https://arxiv.org/abs/1801.07698
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from fairness_dft.faces.crops import ALIGNED_LANDMARKS, ALIGNED_SIZE, square_crops
from fairness_dft.faces.detectors import FaceDetector, InsightFace, YuNet


@dataclass(frozen=True)
class Faces:
    """The largest face of each image.

    Attributes:
        crops: Face crops, float with shape (N, 3, h, w), in [0, 1]; of any content where there is no face.
        boxes: Left, top, right, bottom of the face region in pixels of the image, float with shape (N, 4).
        has_face: Whether the image shows a face, bool with shape (N,).
        landmarks: x and y of the landmarks in pixels, float with shape (N, 5, 2), of any value where there is no face;
            None if the finder has none.
    """

    crops: Tensor
    boxes: Tensor
    has_face: Tensor
    landmarks: Tensor | None = None


class FaceFinder(nn.Module, ABC):
    """Find the largest face of each image.

    Attributes:
        finds_landmarks: Whether it locates eyes, nose and mouth.
    """

    finds_landmarks = False

    def check(self) -> None:  # noqa: B027  a finder without weights needs nothing
        """Refuse weights that cannot be found; load nothing and change no state.

        Raises:
            ValueError: If they cannot be found.
        """

    def load(self) -> None:  # noqa: B027  a finder without weights has nothing to load
        """Load weights; the constructor loads nothing."""

    @abstractmethod
    def forward(self, images: Tensor) -> Faces:
        """Find faces.

        Args:
            images: Images with shape (N, 3, H, W), in [0, 1].
        """

    def submit(self, images: Tensor) -> Callable[[], Faces]:
        """Start to find faces, for a caller with other work to do; the function returned waits for the result.

        A finder that works on the CPU starts at once, while a GPU continues; any other starts when it is waited for.

        Args:
            images: Images, as for `forward`.

        Returns:
            A function that returns what `forward` would.
        """
        return partial(self, images)

    def every(self, images: Tensor) -> tuple[Faces, Tensor]:
        """Find all faces instead of the largest of each image; an image that shows no face has one masked row.

        A finder that knows only one face per image returns that one.

        Args:
            images: Images with shape (N, 3, H, W), in [0, 1].

        Returns:
            M ≥ N rows, and the index of the image of each row, int64 with shape (M,).
        """
        return self(images), torch.arange(len(images), device=images.device)


class WholeFrame(FaceFinder):
    """Treat every image as a face that fills the frame.

    Example:
        >>> faces = WholeFrame()(torch.zeros(2, 3, 64, 64))
        >>> faces.boxes.tolist()
        [[0.0, 0.0, 64.0, 64.0], [0.0, 0.0, 64.0, 64.0]]
        >>> faces.has_face
        tensor([True, True])
    """

    def forward(self, images: Tensor) -> Faces:
        """Return the images themselves, all marked as faces."""
        present = torch.ones(len(images), dtype=torch.bool, device=images.device)
        return Faces(images, whole_frame_boxes(images), present)


def whole_frame_boxes(images: Tensor) -> Tensor:
    """Return boxes that cover the frame, with shape (N, 4)."""
    height, width = images.shape[-2:]
    return images.new_tensor([0, 0, width, height]).expand(len(images), 4)


class DetectedFaces(FaceFinder):
    """The largest face that a detector sees, as a square crop.

    Args:
        detectors: Face detectors; each gets the images in which those before it detected no face.
        margin: How much wider the crop is than the longer side of the box, as a share of it (paper: 0.5).
        size: Side of the crop in pixels (paper: 224).

    Example:
        >>> finder = DetectedFaces([YuNet("data/portraits/yunet.onnx")], size=32)
        >>> finder.load()
        >>> faces = finder(torch.zeros(2, 3, 64, 64))
        >>> faces.has_face, faces.crops.shape
        (tensor([False, False]), torch.Size([2, 3, 32, 32]))
    """

    finds_landmarks = True

    def __init__(self, detectors: Sequence[FaceDetector] | None = None, margin: float = 0.5, size: int = 224) -> None:
        super().__init__()
        self.detectors = [InsightFace(), YuNet()] if detectors is None else list(detectors)
        if not self.detectors:
            raise ValueError("`detectors` must not be empty: name one, or choose fairness_dft.faces.WholeFrame")
        if margin < 0 or size < 1:
            raise ValueError(f"`margin` must not be negative and `size` at least 1, but got {margin} and {size}")
        self.margin, self.size = margin, size

    @override
    def check(self) -> None:
        for detector in self.detectors:
            detector.check()

    @override
    def load(self) -> None:
        for detector in self.detectors:
            detector.load()

    @override
    def forward(self, images: Tensor) -> Faces:
        return self.submit(images)()

    @override
    def submit(self, images: Tensor) -> Callable[[], Faces]:
        detect = self.detect(images)

        def faces() -> Faces:
            boxes, landmarks, mask, _ = detect()
            return self.crop(images, boxes, landmarks, mask)

        return faces

    @override
    def every(self, images: Tensor) -> tuple[Faces, Tensor]:
        boxes, landmarks, mask, owners = self.detect(images, all_faces=True)()
        owners = owners.to(images.device)
        return self.crop(images[owners], boxes, landmarks, mask), owners

    def crop(self, images: Tensor, boxes: Tensor, landmarks: Tensor, mask: Tensor) -> Faces:
        """Return the detected faces with their crops, on the device of the images."""
        crops = square_crops(images, boxes, self.size, self.margin)
        rows = (values.to(images.device, non_blocking=True) for values in (boxes, mask, landmarks))
        return Faces(crops, *rows)

    def detect(self, images: Tensor, all_faces: bool = False) -> Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Start to detect faces in threads; the function returned waits for them.

        The images move to the CPU once for the whole batch. Only the threads wait for a GPU.

        Args:
            images: Images with shape (N, 3, H, W), in [0, 1].
            all_faces: Whether each face has a row, instead of the largest face of each image.

        Returns:
            A function that returns boxes, landmarks and mask, as in `Faces`, and the image of each row, on the CPU.
        """
        pixels = torch.nan_to_num(images.detach().float()).clamp(0, 1).mul(255).round().byte()
        pictures, arrived = on_the_way(pixels.flip(1).permute(0, 2, 3, 1).contiguous())
        pool = ThreadPoolExecutor(threads())
        searches = [pool.submit(lambda picture: arrived() or self.find(picture), picture) for picture in pictures]
        pool.shutdown(wait=False)
        height, width = images.shape[2:]
        nowhere = np.ravel(ALIGNED_LANDMARKS) * (min(height, width) / ALIGNED_SIZE)

        def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            table: list[list[float]] = []
            for image, search in enumerate(searches):
                faces = search.result()
                for box, landmarks in faces if all_faces else faces[:1]:
                    table.append([*box, *landmarks.ravel(), 1, image])
                if not faces:
                    table.append([0, 0, width, height, *nowhere, 0, image])
            values = torch.tensor(table, dtype=torch.float32).reshape(-1, 16)
            points = values[:, 4:14].unflatten(1, (5, 2))  # type: ignore[no-untyped-call]
            return values[:, :4], points, values[:, 14] > 0, values[:, 15].long()

        return rows

    def find(self, picture: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return box and landmarks of all faces, the largest first, by the first detector that detects one."""
        results = (detector.detect(picture).faces() for detector in self.detectors)
        return next((faces for faces in results if faces), [])


def threads() -> int:
    """Return how many images a process examines at a time: its share of the machine's cores.

    PyTorch's number of threads does not tell, since torchrun sets it to one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    return max(1, cores // int(processes))


def on_the_way(values: Tensor) -> tuple[np.ndarray, Callable[[], None]]:
    """Return a copy on the CPU that may still be under way, and a function that waits until it is complete."""
    if values.device.type != "cuda":
        return values.cpu().numpy(), lambda: None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return copy.numpy(), event.synchronize
