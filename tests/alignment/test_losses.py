"""The losses against hand-written loops, their gradients, and what several ranks make of them."""

import math

import pytest
import torch
from torch import Tensor

from fairness_dft.alignment.losses import (
    Alignment,
    alignment_loss,
    dynamic_weights,
    face_gradient_scales,
    face_realism_loss,
    face_references,
    must_change,
    semantics_loss,
)
from fairness_dft.sampling.gradients import scale_gradient


def align(targets: list[int], chosen: list[bool], total: int | None = None) -> Alignment:
    return Alignment(torch.tensor(targets), torch.tensor(chosen), sum(chosen) if total is None else total)


def cross_entropy_by_hand(logits: Tensor, target: int) -> float:
    exponentials = [math.exp(value) for value in logits.tolist()]
    return -math.log(exponentials[target] / sum(exponentials))


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (2, 2), (5, 4), (9, 7)])
def test_alignment_loss_is_the_mean_cross_entropy_over_the_chosen(n: int, classes: int) -> None:
    logits = torch.randn(n, classes, dtype=torch.float64)
    targets, chosen = torch.randint(classes, (n,)), torch.rand(n) < 0.6
    chosen[0] = True
    expected = [cross_entropy_by_hand(logits[i], int(targets[i])) for i in range(n) if chosen[i]]
    loss = alignment_loss(logits, Alignment(targets, chosen, int(chosen.sum())))
    torch.testing.assert_close(loss.item(), sum(expected) / len(expected))


def test_images_without_target_neither_dilute_the_loss_nor_get_a_gradient() -> None:
    few = torch.randn(3, 2, requires_grad=True)
    many = torch.cat([few.detach(), torch.randn(5, 2)]).requires_grad_()
    loss_of_few = alignment_loss(few, align([0, 1, 1], [True] * 3))
    loss_of_many = alignment_loss(many, align([0, 1, 1, 0, 1, 0, 1, 0], [True] * 3 + [False] * 5))
    torch.testing.assert_close(loss_of_many, loss_of_few)  # a mean over all eight would be 3 / 8 of it
    loss_of_few.backward()
    loss_of_many.backward()
    torch.testing.assert_close(many.grad[:3], few.grad)
    assert not many.grad[3:].any()


def test_where_not_chosen_the_target_may_be_any_value() -> None:
    logits = torch.randn(2, 2)
    expected = alignment_loss(logits, align([1, 0], [True, False]))
    torch.testing.assert_close(alignment_loss(logits, align([1, -100], [True, False])), expected)
    torch.testing.assert_close(alignment_loss(logits, align([1, 7], [True, False])), expected)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_nothing_chosen_is_a_zero_with_a_graph_and_no_gradient(n: int) -> None:
    logits = torch.randn(n, 3, requires_grad=True)
    loss = alignment_loss(logits, Alignment(torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.bool), 0))
    assert loss.item() == 0 and loss.grad_fn is not None
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("chosen", [[1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
def test_the_mean_gradient_of_two_ranks_is_that_of_one_process(chosen: list[int]) -> None:
    weight = torch.randn(4, 2, dtype=torch.float64)
    features = torch.randn(6, 4, dtype=torch.float64)
    targets, mask = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor(chosen).bool()

    def gradient(rows: slice, world_size: int) -> Tensor:
        parameter = weight.clone().requires_grad_()
        alignment = Alignment(targets[rows], mask[rows], int(mask.sum()))
        alignment_loss(features[rows] @ parameter, alignment, world_size).backward()
        return parameter.grad

    averaged = (gradient(slice(0, 3), 2) + gradient(slice(3, 6), 2)) / 2
    torch.testing.assert_close(averaged, gradient(slice(0, 6), 1))


@pytest.mark.parametrize(
    ("target", "chosen", "original", "both_faces", "weight"),
    [
        (1, True, 1, True, 1.0),  # the target is the class of o
        (1, True, 0, True, 0.2),  # it is another one
        (1, False, 1, True, 0.2),  # no confident target, although its placeholder is the class of o
        (1, False, 0, True, 0.2),
        (1, True, 1, False, 1.0),  # no face was found
        (1, True, 0, False, 1.0),
        (1, False, 0, False, 1.0),
        (1, False, 1, False, 1.0),
    ],
)
def test_the_dynamic_weight_is_that_of_the_paper(
    target: int, chosen: bool, original: int, both_faces: bool, weight: float
) -> None:
    changing = must_change(align([target], [chosen]), torch.tensor([original]), torch.tensor([both_faces]))
    assert changing.dtype == torch.bool and changing.shape == (1,)
    loss = semantics_loss([torch.tensor([0.25])], dynamic_weights([changing], [0.2]))
    torch.testing.assert_close(loss.item(), weight * 0.75)


def test_semantics_loss_is_the_weighted_mean_over_images_of_summed_distances() -> None:
    clip, dino = torch.tensor([1.0, 0.5, -1.0]), torch.tensor([0.0, 0.9, 1.0])
    loss = semantics_loss([clip, dino], torch.tensor([1.0, 0.2, 0.2]))
    torch.testing.assert_close(loss.item(), (1.0 * 1.0 + 0.2 * (0.5 + 0.1) + 0.2 * 2.0) / 3)


def test_semantics_loss_without_networks_is_zero() -> None:
    assert semantics_loss([], torch.tensor([0.2, 1.0])).item() == 0


def test_the_gradient_of_the_semantics_loss_carries_the_weight() -> None:
    cosine = torch.tensor([0.3, 0.3], requires_grad=True)
    semantics_loss([cosine], torch.tensor([0.2, 1.0])).backward()
    torch.testing.assert_close(cosine.grad, torch.tensor([-0.1, -0.5]))


def test_of_several_attributes_the_smallest_factor_that_applies_is_taken() -> None:
    gender, race = torch.tensor([False, True, False, True]), torch.tensor([False, False, True, True])
    weights = dynamic_weights([gender, race], [0.2, 0.6])
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.2, 0.6, 0.2]))
    torch.testing.assert_close(dynamic_weights([race, gender], [0.6, 0.2]), weights)


def face_gradient(box: list[float], other: list[float], scale: float = 0.2) -> Tensor:
    """The factor that each pixel of a 6×8 image's gradient is multiplied by."""
    images = torch.rand(1, 3, 6, 8, requires_grad=True)
    upstream = torch.randn(1, 3, 6, 8)
    scales = face_gradient_scales(images, torch.tensor([box]), torch.tensor([other]), torch.tensor([scale]))
    scaled = scale_gradient(images, scales)
    torch.testing.assert_close(scaled, images, rtol=0, atol=0)
    scaled.backward(upstream)
    factors = images.grad / upstream
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))  # all channels alike
    return factors[0, 0]


def factors_by_hand(left: float, top: float, right: float, bottom: float, face_gradient_factor: float = 0.2) -> Tensor:
    return torch.tensor(
        [
            [face_gradient_factor if left <= x + 0.5 < right and top <= y + 0.5 < bottom else 1.0 for x in range(8)]
            for y in range(6)
        ]
    )


@pytest.mark.parametrize(
    ("box", "other", "intersection"),
    [
        ([0, 0, 8, 6], [0, 0, 8, 6], (0, 0, 8, 6)),
        ([1, 1, 5, 4], [3, 2, 8, 6], (3, 2, 5, 4)),
        ([0.4, 1.6, 4.5, 3.51], [0, 0, 8, 6], (0.4, 1.6, 4.5, 3.51)),
        ([-3, -3, 4, 3], [0, 0, 20, 20], (0, 0, 4, 3)),  # boxes may leave the image
        ([0, 0, 3, 3], [4, 4, 8, 6], (4, 4, 3, 3)),  # disjoint
        ([0, 0, 3, 6], [3, 0, 8, 6], (3, 0, 3, 6)),  # they touch
        ([2, 2, 2, 2], [0, 0, 8, 6], (2, 2, 2, 2)),  # empty
    ],
)
def test_the_gradient_is_scaled_inside_the_intersection_alone(
    box: list[float], other: list[float], intersection: tuple[float, float, float, float]
) -> None:
    torch.testing.assert_close(face_gradient(box, other), factors_by_hand(*intersection))


def test_the_region_counts_pixels_by_their_centre() -> None:
    factors = face_gradient([1.5, 2.5, 3.5, 4.5], [0, 0, 8, 6])
    assert (factors < 1).any(0).tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert (factors < 1).any(1).tolist() == [0, 0, 1, 1, 0, 0]


def test_images_that_need_not_change_keep_their_gradient() -> None:
    torch.testing.assert_close(face_gradient([0, 0, 8, 6], [0, 0, 8, 6], scale=1.0), torch.ones(6, 8))


@pytest.mark.parametrize("face_gradient_factor", [0.0, 0.5, 1.0])
def test_every_scale_is_possible(face_gradient_factor: float) -> None:
    expected = factors_by_hand(1, 1, 5, 5, face_gradient_factor)
    torch.testing.assert_close(face_gradient([1, 1, 5, 5], [1, 1, 5, 5], scale=face_gradient_factor), expected)


def test_every_image_has_its_own_region() -> None:
    images = torch.rand(3, 3, 4, 4, requires_grad=True)
    boxes = torch.tensor([[0.0, 0, 2, 2], [2, 2, 4, 4], [0, 0, 4, 4]])
    whole = torch.tensor([[0.0, 0, 4, 4]]).expand(3, 4)
    scales = face_gradient_scales(images, boxes, whole, torch.tensor([0.0, 0.0, 1.0]))
    scale_gradient(images, scales).sum().backward()
    expected = torch.ones(3, 3, 4, 4)
    expected[0, :, :2, :2] = 0
    expected[1, :, 2:, 2:] = 0
    torch.testing.assert_close(images.grad, expected)


def test_no_images_are_no_trouble() -> None:
    nothing = torch.zeros(0, 4)
    scales = face_gradient_scales(torch.rand(0, 3, 4, 4), nothing, nothing, torch.ones(0))
    assert scales.shape == (0, 1, 4, 4)


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(shape, dtype=torch.float64), dim=-1)


def test_reference_is_the_original_or_the_nearest_face_of_the_bank() -> None:
    faces, originals, bank = unit(7, 4).requires_grad_(), unit(7, 4).requires_grad_(), unit(30, 4)
    keep = torch.tensor([True, False, False, True, False, True, False])
    references = face_references(faces, originals, keep, bank)
    assert not references.requires_grad
    for i in range(7):
        nearest = min(bank, key=lambda face, i=i: float((face - faces[i].detach()).square().sum()))
        torch.testing.assert_close(references[i], originals[i].detach() if keep[i] else nearest)


def test_face_loss_is_the_mean_distance_of_the_faces_seen() -> None:
    faces, references = unit(5, 3).requires_grad_(), unit(5, 3)
    seen = torch.tensor([True, False, True, True, False])
    loss = face_realism_loss(faces, references, seen, 3)
    cosines = [sum(a * b for a, b in zip(faces[i].tolist(), references[i].tolist(), strict=True)) for i in (0, 2, 3)]
    assert loss.item() == pytest.approx(sum(1 - cosine for cosine in cosines) / 3)
    loss.backward()
    assert not faces.grad[~seen].any() and faces.grad[seen].any()


def test_no_face_gives_a_face_loss_of_zero_with_a_graph() -> None:
    faces = unit(3, 4).requires_grad_()
    loss = face_realism_loss(faces, unit(3, 4), torch.zeros(3, dtype=torch.bool), 0)
    loss.backward()
    assert loss.item() == 0 and not faces.grad.any()


@pytest.mark.parametrize("seen", [[1, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
def test_the_mean_face_gradient_of_two_ranks_is_that_of_one_process(seen: list[int]) -> None:
    faces, references, mask = unit(4, 3), unit(4, 3), torch.tensor(seen).bool()
    weight = torch.eye(3, dtype=torch.float64)

    def gradient(rows: slice, world_size: int) -> Tensor:
        parameter = weight.clone().requires_grad_()
        total = int(mask.sum())
        face_realism_loss(faces[rows] @ parameter, references[rows], mask[rows], total, world_size).backward()
        return parameter.grad

    averaged = (gradient(slice(0, 2), 2) + gradient(slice(2, 4), 2)) / 2
    torch.testing.assert_close(averaged, gradient(slice(0, 4), 1))
