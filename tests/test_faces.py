"""The face finder that takes every image for a face."""

import pytest
import torch

from fairness_dft.faces import WholeFrame, whole_frame_boxes


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 3, 1, 1), (3, 3, 5, 7)])
def test_the_whole_frame_is_a_face_of_every_image(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    finder = WholeFrame()
    finder.load()
    faces = finder(images)
    assert faces.mask.dtype == torch.bool and faces.mask.tolist() == [True] * shape[0]
    assert faces.boxes.tolist() == [[0, 0, shape[3], shape[2]]] * shape[0]
    torch.testing.assert_close(faces.crops, images)


def test_the_crop_passes_gradients_to_the_image() -> None:
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    WholeFrame()(images).crops.sum().backward()
    torch.testing.assert_close(images.grad, torch.ones_like(images))


def test_boxes_take_precision_and_place_from_the_images() -> None:
    assert whole_frame_boxes(torch.rand(2, 3, 4, 4, dtype=torch.float64)).dtype == torch.float64
