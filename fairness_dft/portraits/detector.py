"""The miniature face detector, in the layouts of insightface's SCRFD and of OpenCV's YuNet.

One small network, which at strides of 8, 16 and 32 pixels says of each cell whether a face of fitting size has its
middle there, and how far its sides and landmarks are. Both layouts are the same predictions in other words, so that
the project's detectors are tested on the libraries' own code.

References:
    SCRFD (Guo et al., 2021), https://arxiv.org/abs/2105.04714
    YuNet (Wu et al., 2023), https://doi.org/10.1007/s11633-023-1423-y
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss

from fairness_dft.faces.detectors import FaceDetector, InsightFace, YuNet
from fairness_dft.portraits.draw import SIZE, draw
from fairness_dft.portraits.text_to_image import reconstruct
from fairness_dft.portraits.training import count_parameters, optimise
from fairness_dft.portraits.world import sample

STRIDES = (8, 16, 32)
RATIOS = (1.25, 4.0)  # of a face's longer side to the stride of a level that learns it
SCRFD_FOLDER, YUNET_FILE = "detector", "yunet.onnx"


@dataclass
class FacePictures:
    """Drawn pictures, each with at most one face.

    Attributes:
        pictures: uint8, with shape (N, 3, 64, 64).
        present: Whether a face is seen, bool with shape (N,).
        boxes: Left, top, right, bottom in pixels, with shape (N, 4); zeros without a face.
        landmarks: In pixels, with shape (N, 5, 2); zeros without a face.
    """

    pictures: Tensor
    present: Tensor
    boxes: Tensor
    landmarks: Tensor

    def images(self, index: Tensor | slice) -> Tensor:
        """Return some of the images as floats, with shape (n, 3, 64, 64), in [0, 1]."""
        return self.pictures[index].float() / 255


def draw_faces(count: int, seed: int) -> FacePictures:
    """Draw pictures, every second with the face anywhere; the same for the same seed."""
    random = np.random.default_rng(seed)
    drawings = [draw(sample(random, balanced=True).appearance, random, anywhere=i % 2 == 1) for i in range(count)]
    boxes = [np.zeros(4) if drawing.box is None else drawing.box for drawing in drawings]
    landmarks = [np.zeros((5, 2)) if drawing.landmarks is None else drawing.landmarks for drawing in drawings]
    return FacePictures(
        torch.from_numpy(np.stack([drawing.picture for drawing in drawings])).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([drawing.box is not None for drawing in drawings]),
        torch.from_numpy(np.stack(boxes)).float(),
        torch.from_numpy(np.stack(landmarks)).float(),
    )


class Detector(nn.Module):
    """Predicts, for each cell of each stride, the logit of a face, its box and its landmarks.

    In units of the stride, relative to the cell's corner: distances to left, top, right and bottom, and x and y of the
    landmarks.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 24, 40, 64, 64)) -> None:
        super().__init__()
        channels = (3, *widths)
        blocks = [self.block(inputs, outputs) for inputs, outputs in zip(channels, widths, strict=False)]
        self.stem = nn.Sequential(*blocks[:2])
        self.levels = nn.ModuleList(blocks[2:])
        self.heads = nn.ModuleList(nn.Conv2d(width, 15, 3, padding=1) for width in widths[2:])

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        """Half the resolution."""
        layers: list[nn.Module] = []
        for before, stride in ((inputs, 2), (outputs, 1)):
            layers += [nn.Conv2d(before, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Predictions of each stride, with shape (B, cells, 15), row by row, for pixels in [-1, 1]."""
        hidden, found = self.stem(pixels), []
        for level, head in zip(self.levels, self.heads, strict=True):
            hidden = level(hidden)
            found.append(head(hidden).permute(0, 2, 3, 1).flatten(1, 2))
        return found


def cells(stride: int) -> Tensor:
    """Corners of a level's cells in pixels, row by row, with shape (cells, 2)."""
    at = torch.arange(0, SIZE, stride).float()
    return torch.cartesian_prod(at, at).flip(1)


def detector_loss(found: list[Tensor], present: Tensor, boxes: Tensor, landmarks: Tensor) -> Tensor:
    """Cross-entropy of the cells, and distances of boxes and landmarks where there is a face.

    Args:
        found: What `Detector` predicts for B pictures.
        present: Whether they show a face, bool with shape (B,).
        boxes: Their faces, in pixels, with shape (B, 4).
        landmarks: In pixels, with shape (B, 5, 2).
    """
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(min=1)
    logits, faces, distances = [], [], []
    for level, stride in zip(found, STRIDES, strict=True):
        corners = cells(stride)
        away = (corners - centres[:, None]).abs().amax(2)
        near = away <= torch.clamp(0.3 * sides, min=0.5 * stride)[:, None]
        fits = present & (sides >= RATIOS[0] * stride) & (sides <= RATIOS[1] * stride)
        face = near & fits[:, None]
        truth = torch.cat(
            [
                corners - boxes[:, None, :2],
                boxes[:, None, 2:] - corners,
                (landmarks[:, None] - corners[:, None]).flatten(2),
            ],
            2,
        )
        logits.append(level[..., 0])
        faces.append(face)
        distances.append(((level[..., 1:] - truth / stride).abs().mean(2) * stride / sides[:, None])[face])
    logit, face = torch.cat(logits, 1), torch.cat(faces, 1)
    count = face.sum().clamp(min=1)
    seen = binary_cross_entropy_with_logits(logit, face.float(), reduction="sum") / count
    where = torch.cat(distances)
    return seen + 5 * l1_loss(where, torch.zeros_like(where), reduction="sum") / count


class Scrfd(nn.Module):
    """The detector in the layout of insightface: nine outputs, (scores, boxes, landmarks) × strides, two anchors."""

    names = tuple(f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES)

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, blob: Tensor) -> tuple[Tensor, ...]:
        """One picture, red, green, blue, as (value - 127.5) / 128."""
        levels = [level[0].repeat_interleave(2, 0) for level in self.detector(blob * (128 / 127.5))]
        parts = [(level[:, :1].sigmoid(), level[:, 1:5], level[:, 5:]) for level in levels]
        return tuple(part[i] for i in range(3) for part in parts)


class YuNetLayout(nn.Module):
    """The detector in the layout of OpenCV: twelve outputs, (class, object, boxes, landmarks) × strides."""

    names = tuple(f"{kind}_{stride}" for kind in ("cls", "obj", "bbox", "kps") for stride in STRIDES)

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, blob: Tensor) -> tuple[Tensor, ...]:
        """Pictures, blue, green, red, with values in [0, 255]."""
        parts = []
        for level in self.detector(blob.flip(1) / 127.5 - 1):
            score, near, far = level[..., :1].sigmoid(), level[..., 1:3], level[..., 3:5]
            box = torch.cat([(far - near) / 2, (far + near).clamp(min=0.01).log()], -1)
            parts.append((score, score, box, level[..., 5:]))
        return tuple(part[i] for i in range(4) for part in parts)


def export(network: Scrfd | YuNetLayout, file: Path) -> None:
    """Write an ONNX file that takes pictures of any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.zeros(1, 3, SIZE, SIZE),),
            str(file),
            input_names=["input"],
            output_names=list(network.names),
            dynamic_axes={"input": {2: "height", 3: "width"}},
            opset_version=13,
            dynamo=False,
        )


def train_detector(autoencoder: AutoencoderKL, folder: Path, scale: float) -> dict[str, object]:
    """Train the detector, write both layouts into a folder, and measure them on held-out draws."""
    faces = draw_faces(int(16_000 * scale), 51)
    decoded = reconstruct(autoencoder, faces.images(slice(0, None, 4)))
    faces.pictures[::4] = (decoded * 255).round().byte()
    torch.manual_seed(51)
    detector = Detector()

    def loss(step: int) -> Tensor:
        index = torch.randint(len(faces.pictures), (64,))
        images = faces.images(index)
        noise = 0.03 * torch.rand(len(index), 1, 1, 1) * torch.randn_like(images)
        brightness = 1 + 0.08 * torch.randn(len(index), 1, 1, 1)
        pixels = (images * brightness + noise).clamp(0, 1) * 2 - 1
        return detector_loss(detector(pixels), faces.present[index], faces.boxes[index], faces.landmarks[index])

    steps = int(3_000 * scale)
    seconds = optimise("face detector", [detector], loss, steps, 3e-3, 51, weight_decay=0.05)
    (folder / SCRFD_FOLDER).mkdir(parents=True, exist_ok=True)
    export(Scrfd(detector), folder / SCRFD_FOLDER / "scrfd.onnx")
    export(YuNetLayout(detector), folder / YUNET_FILE)
    figures: dict[str, object] = {"parameters": count_parameters(detector), "steps": steps, "seconds": round(seconds)}
    test = draw_faces(max(200, int(2_000 * scale)), 52)
    decoded = reconstruct(autoencoder, test.images(slice(None)))
    scrfd, yunet = InsightFace(str(folder / SCRFD_FOLDER), size=(SIZE, SIZE)), YuNet(str(folder / YUNET_FILE))
    for name, layout in (("scrfd", scrfd), ("yunet", yunet)):
        layout.load()
        figures[name] = {
            "drawn": detection_figures(layout, test, test.images(slice(None))),
            "reconstructed": detection_figures(layout, test, decoded),
        }
    return figures


def detection_figures(detector: FaceDetector, truth: FacePictures, images: Tensor) -> dict[str, float | None]:
    """Recall, precision (a face is found where the boxes' intersection is half of their union) and landmark error.

    Args:
        detector: Loaded.
        truth: Where the faces are.
        images: The same pictures, or others of the same faces, with shape (N, 3, 64, 64), in [0, 1].

    Returns:
        `recall` and `precision` in [0, 1], and `landmark_error`, the mean distance of the landmarks of found faces in
        pixels, or None if none was found.
    """
    pictures = (images * 255).round().byte().flip(1).permute(0, 2, 3, 1).contiguous().numpy()
    reported = right = 0
    errors: list[float] = []
    for i, picture in enumerate(pictures):
        found = detector.detect(picture)
        reported += len(found.boxes)
        matches = [j for j, box in enumerate(found.boxes) if overlap(box, truth.boxes[i].numpy()) >= 0.5]
        if bool(truth.present[i]) and matches:
            right += 1
            errors.append(
                float(np.linalg.norm(found.landmarks[matches[0]] - truth.landmarks[i].numpy(), axis=1).mean())
            )
    return {
        "recall": round(right / int(truth.present.sum()), 4),
        "precision": round(right / max(reported, 1), 4),
        "landmark_error": round(float(np.mean(errors)), 3) if errors else None,
    }


def overlap(box: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Intersection over union of two boxes."""
    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    shared = np.prod(sides.clip(0))
    return float(shared / (np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2]) - shared))
