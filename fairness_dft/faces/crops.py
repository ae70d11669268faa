"""Differentiable crops of faces: squares around boxes, and faces aligned by five landmarks."""

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

ALIGNED_SIZE = 112
# Where ArcFace expects the landmarks, in pixels of an aligned face.
ALIGNED_LANDMARKS = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)


def square_crops(images: Tensor, boxes: Tensor, size: int, margin: float = 0.5) -> Tensor:
    """Return square crops around boxes, differentiable in the images; edge pixels repeat beyond the edge of an image.

    A crop that is scaled down is first sampled more finely and then averaged, so that every pixel of the face counts
    and gets its gradient.

    Args:
        images: Images with shape (N, 3, H, W).
        boxes: Left, top, right, bottom in pixels, with shape (N, 4); best on the CPU, which avoids waiting for a GPU.
        size: Side of the crops in pixels.
        margin: The crop's side is (1 + margin) times the longer side of the box.

    Returns:
        Crops, with shape (N, 3, size, size).
    """
    centers, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, (1 + margin) * (boxes[:, 2:] - boxes[:, :2]).amax(1)
    # A sample is interpolated between two by two pixels.
    finer = max(1, math.ceil(float(sides.max()) / (2 * size))) if len(sides) else 1
    scales = finer * size / sides
    # An image's first pixel lies at 0 and covers half a unit to each side.
    shifts = finer * size / 2 - 0.5 - scales[:, None] * (centers - 0.5)
    zeros = torch.zeros_like(scales)
    rows = [torch.stack([scales, zeros, shifts[:, 0]], 1), torch.stack([zeros, scales, shifts[:, 1]], 1)]
    transforms = torch.stack(rows, 1).to(images.device, non_blocking=True)
    return avg_pool2d(warp(images, transforms, finer * size, "border"), finer)


def aligned_faces(images: Tensor, landmarks: Tensor, size: int = ALIGNED_SIZE) -> Tensor:
    """Return aligned faces as insightface computes them, differentiable in the images; black beyond the edge.

    Args:
        images: Images with shape (N, 3, H, W).
        landmarks: Landmarks of the face in each, in pixels, with shape (N, 5, 2).
        size: Side of the aligned faces in pixels; for multiples of 128 insightface leaves more room beside the face.

    Returns:
        Faces, with shape (N, 3, size, size).
    """
    places = landmarks.new_tensor(ALIGNED_LANDMARKS)
    if size % 128 == 0 and size % ALIGNED_SIZE:
        places = (places + places.new_tensor([8.0, 0.0])) * (size / 128)
    else:
        places = places * (size / ALIGNED_SIZE)
    return warp(images, similarity_transforms(landmarks, places), size, "zeros")


def similarity_transforms(points: Tensor, places: Tensor) -> Tensor:
    """Return the similarity transforms that map points to their places best, in the least-squares sense.

    With points and places as complex numbers z and w relative to their means, w ≈ a z has the solution
    a = Σ conj(z) w / Σ |z|².

    Args:
        points: Points with shape (N, M, 2).
        places: Target points with shape (M, 2).

    Returns:
        Matrices [[Re a, -Im a, x], [Im a, Re a, y]], with shape (N, 2, 3).
    """
    z, w = points - points.mean(1, keepdim=True), places - places.mean(0)
    norm = z.square().sum((1, 2))
    real = (z * w).sum((1, 2)) / norm
    imaginary = (z[..., 0] * w[:, 1] - z[..., 1] * w[:, 0]).sum(1) / norm
    # No matrix products, which autocast would compute in half precision.
    (x, y), (to_x, to_y) = points.mean(1).unbind(1), places.mean(0)
    first = torch.stack([real, -imaginary, to_x - real * x + imaginary * y], 1)
    second = torch.stack([imaginary, real, to_y - imaginary * x - real * y], 1)
    return torch.stack([first, second], 1)


def warp(images: Tensor, transforms: Tensor, size: int, padding: str) -> Tensor:
    """Return images moved by affine transforms of pixel coordinates, with shape (N, 3, size, size).

    Coordinates are too coarse in half precision, so it computes in single precision or more.
    """
    from kornia.geometry.transform import warp_affine

    exact = torch.promote_types(images.dtype, torch.float32)
    with torch.autocast(images.device.type, enabled=False):
        moved = warp_affine(
            images.to(exact), transforms.to(exact), (size, size), padding_mode=padding, align_corners=True
        )
    return moved.to(images.dtype)
