"""Build a random face network in the layout of ArcFace, and folders of drawn faces."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from fairness_dft.portraits.detector import draw_faces
from fairness_dft.portraits.world import DATA

SCRFD, YUNET = str(DATA / "detector"), str(DATA / "yunet.onnx")
SIZE = 28


def bgr(images: torch.Tensor) -> np.ndarray:
    """Return images as detectors read them: uint8, in the order blue, green, red."""
    return (images * 255).round().byte().flip(1).permute(0, 2, 3, 1).contiguous().numpy()


def build_arcface(file: Path, size: int = SIZE, width: int = 8, seed: int = 0) -> Path:
    """Save a network with random weights whose embeddings differ visibly between faces."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.PReLU(6), nn.Conv2d(6, 8, 3, 2, 1), nn.Flatten()]
        network = nn.Sequential(*layers, nn.Linear(8 * (size // 4) ** 2, width)).eval()
        options = {"input_names": ["input.1"], "dynamic_axes": {"input.1": {0: "n"}}, "dynamo": False}
        torch.onnx.export(network, (torch.zeros(1, 3, size, size),), str(file), **options)
    return file


def save_pictures(folder: Path, count: int, seed: int = 0) -> list[bool]:
    """Save drawn images as PNG files, and return which of them show a face."""
    folder.mkdir(parents=True, exist_ok=True)
    faces = draw_faces(count, seed)
    for i, pixels in enumerate(faces.pictures):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return faces.present.tolist()
