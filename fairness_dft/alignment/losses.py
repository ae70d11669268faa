"""The losses: distributional alignment, and image semantics and face realism beside it.

    L_align = mean of CE(h(x_i), y_i) over the images with a face and confidence c_i ≥ C
    L_img   = mean of λ_i [(1 − cos(CLIP(x_i), CLIP(o_i))) + (1 − cos(DINO(x_i), DINO(o_i)))]
    L_face  = mean of (1 − cos(e(x_i), r_i)) over the images with a face

x_i are the generated `images`, o_i the frozen model's images from the same noise, h(x_i) the classifier's
`logits`, y_i the dynamic `targets`. λ_i (`weights`) is 1 where x_i need not change class, else `semantics_factor`; the
gradient that reaches the face region of x_i through L_img is scaled by `face_gradient_factor` in the same cases. Of
several attributes the smallest factor that applies is taken, and L_align is the sum of theirs. e(x_i) is the
embedding of the aligned face of x_i; its reference r_i is that of o_i where the face may stay as it is, else the
nearest real one.

References:
    Finetuning Text-to-Image Diffusion Models for Fairness (Shen et al., 2024), sections 4.1 and 4.3,
    https://arxiv.org/abs/2311.07604
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Alignment:
    """The dynamic targets of this rank's images for one attribute.

    Attributes:
        targets: y, the class that an image should become, int64 with shape (N,); any value where not
            `chosen`.
        chosen: whether the image shows a face and its target is confident enough, bool with shape (N,).
        total: number of chosen images over all ranks.
    """

    targets: Tensor
    chosen: Tensor
    total: int


def alignment_loss(logits: Tensor, alignment: Alignment, world_size: int = 1) -> Tensor:
    """Compute L_align, the distributional alignment loss.

    The mean runs over the chosen images of all ranks. Since DDP averages gradients over ranks, this rank's
    sum is multiplied by `world_size`, so that the gradient is that of one process with the whole batch.

    Args:
        logits: of the attribute, with shape (N, K).
        alignment: the dynamic targets of these images.
        world_size: number of ranks.

    Returns:
        A scalar; a zero that still carries a graph where no image is chosen.

    Example:
        >>> alignment = Alignment(torch.tensor([1, 0]), torch.tensor([True, False]), total=1)
        >>> alignment_loss(torch.zeros(2, 2), alignment)
        tensor(0.6931)
    """
    if not alignment.chosen.any():
        return logits.sum() * 0
    chosen = alignment.chosen
    total = cross_entropy(logits[chosen], alignment.targets[chosen], reduction="sum")
    return total * world_size / alignment.total


def must_change(alignment: Alignment, original_classes: Tensor, both_faces: Tensor) -> Tensor:
    """Where the image is asked to leave the original's class, or has no confident target to say otherwise.

    Args:
        alignment: the dynamic targets.
        original_classes: class of each original image o, int64 with shape (N,).
        both_faces: whether x and o both show a face, bool with shape (N,); elsewhere nothing need change.

    Returns:
        bool, with shape (N,).
    """
    return both_faces & ~(alignment.chosen & (alignment.targets == original_classes))


def dynamic_weights(changing: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Return the smallest factor among the attributes in which the image has to change, or 1.

    Args:
        changing: see `must_change`, for each attribute bool with shape (N,).
        factors: semantics_factor, or face_gradient_factor, of each attribute, in [0, 1].

    Returns:
        Float with shape (N,), in [0, 1].
    """
    weights = [torch.where(mask, factor, 1.0) for mask, factor in zip(changing, factors, strict=True)]
    return torch.stack(weights).amin(0)


def semantics_loss(similarities: list[Tensor], weights: Tensor) -> Tensor:
    """Compute L_img, the image-semantics loss with its dynamic weights.

    Args:
        similarities: For each feature network the cosines of x_i and o_i, each with shape (N,).
        weights: λ_i, with shape (N,), in [0, 1].

    Returns:
        A scalar, not negative.

    Example:
        >>> semantics_loss([torch.tensor([1.0, 0.5])], torch.tensor([1.0, 0.2]))
        tensor(0.0500)
    """
    distances = sum((1 - cosine for cosine in similarities), torch.zeros_like(weights))
    return (weights * distances).mean()


def face_references(embeddings: Tensor, originals: Tensor, keep: Tensor, bank: Tensor) -> Tensor:
    """r_i, what each face should resemble: the original's face, or the nearest one of a bank of real faces.

    Args:
        embeddings: e(x_i), of unit length, with shape (N, D).
        originals: e(o_i), of unit length, with shape (N, D).
        keep: whether the original's face is the reference, bool with shape (N,).
        bank: embeddings of real faces, with shape (M, D), M > 0.

    Returns:
        References, with shape (N, D), without a graph.
    """
    nearest = bank[torch.cdist(embeddings.detach(), bank).argmin(1)]  # of unit length, so the most similar one
    return torch.where(keep[:, None], originals.detach(), nearest)


def face_realism_loss(embeddings: Tensor, references: Tensor, seen: Tensor, total: int, world_size: int = 1) -> Tensor:
    """L_face, the face-realism loss; as in `alignment_loss`, the mean runs over the faces of all ranks.

    Args:
        embeddings: e(x_i), of unit length, with shape (N, D).
        references: r_i, of unit length, with shape (N, D).
        seen: whether x_i shows a face, bool with shape (N,).
        total: number of faces over all ranks.
        world_size: number of ranks.

    Returns:
        A scalar, not negative; a zero that still carries a graph where no face is seen.
    """
    if not seen.any():
        return embeddings.sum() * 0
    distances = 1 - (embeddings[seen] * references[seen]).sum(1)
    return distances.sum() * world_size / total


def face_gradient_scales(images: Tensor, boxes: Tensor, other_boxes: Tensor, scales: Tensor) -> Tensor:
    """Return the factor of the gradient at each pixel: a scale inside the face region, 1 elsewhere.

    Args:
        images: x, with shape (N, 3, H, W).
        boxes: face boxes of x (left, top, right, bottom in pixels), with shape (N, 4).
        other_boxes: Face boxes of o in the same format; the face region is the intersection of both.
        scales: the scale of each image, with shape (N,), in [0, 1].

    Returns:
        Float with shape (N, 1, H, W), in [0, 1].
    """
    left, top = torch.maximum(boxes[:, :2], other_boxes[:, :2]).unbind(1)
    right, bottom = torch.minimum(boxes[:, 2:], other_boxes[:, 2:]).unbind(1)
    rows = torch.arange(images.shape[2], device=images.device) + 0.5
    columns = torch.arange(images.shape[3], device=images.device) + 0.5
    inside_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < right[:, None])
    region = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return torch.where(region, scales[:, None, None, None], 1.0)
