"""The miniature face detector: its loss against loops, its two layouts against each other."""

import math

import pytest
import torch
from torch.testing import assert_close

from fairness_dft.portraits.detector import RATIOS, STRIDES, Detector, Scrfd, YuNetLayout, detector_loss, draw_faces


def test_drawn_faces_are_those_of_their_seed() -> None:
    faces, again = draw_faces(40, seed=1), draw_faces(40, seed=1)
    assert torch.equal(faces.pictures, again.pictures) and torch.equal(faces.boxes, again.boxes)
    assert 0.7 < faces.present.float().mean() < 1
    here = faces.present
    assert (faces.boxes[~here] == 0).all() and (faces.landmarks[~here] == 0).all()
    inside = (faces.landmarks > faces.boxes[:, None, :2]) & (faces.landmarks < faces.boxes[:, None, 2:])
    assert inside[here].all() and (faces.boxes >= 0).all() and (faces.boxes <= 64).all()
    sides = (faces.boxes[:, 2:] - faces.boxes[:, :2]).amax(1)
    middle, anywhere = sides[::2][here[::2]], sides[1::2][here[1::2]]
    assert middle.max() - middle.min() < 6 and anywhere.max() - anywhere.min() > 10


def test_loss_equals_a_loop_over_cells() -> None:
    torch.manual_seed(0)
    faces = draw_faces(6, seed=4)
    faces.present[2] = False
    found = [torch.randn(6, (64 // stride) ** 2, 15) for stride in STRIDES]
    positive, cross_entropy, distance = 0, 0.0, 0.0
    for i in range(6):
        left, top, right, bottom = faces.boxes[i].tolist()
        side = max(right - left, bottom - top)
        for level, stride in zip(found, STRIDES, strict=True):
            for cell, values in enumerate(level[i].tolist()):
                x, y = cell % (64 // stride) * stride, cell // (64 // stride) * stride
                near = max(abs(x - (left + right) / 2), abs(y - (top + bottom) / 2)) <= max(0.3 * side, 0.5 * stride)
                face = near and bool(faces.present[i]) and RATIOS[0] * stride <= side <= RATIOS[1] * stride
                cross_entropy += math.log1p(math.exp(-values[0] if face else values[0]))
                if face:
                    positive += 1
                    points = [(px - x, py - y) for px, py in faces.landmarks[i].tolist()]
                    truth = [x - left, y - top, right - x, bottom - y, *(v for point in points for v in point)]
                    gaps = [abs(v * stride - t) for v, t in zip(values[1:], truth, strict=True)]
                    distance += sum(gaps) / 14 / side
    assert positive >= 4
    loss = detector_loss(found, faces.present, faces.boxes, faces.landmarks)
    assert loss.item() == pytest.approx((cross_entropy + 5 * distance) / positive, rel=1e-4)


def test_pictures_without_faces_give_a_finite_gradient() -> None:
    faces, detector = draw_faces(3, seed=5), Detector()
    faces.present[:], faces.boxes[:] = False, 0
    detector_loss(detector(torch.zeros(3, 3, 64, 64)), faces.present, faces.boxes, faces.landmarks).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


def test_both_layouts_say_the_same() -> None:
    torch.manual_seed(0)
    detector = Detector().eval()
    for head in detector.heads:
        head.bias.data[1:5] = 2  # boxes around their cells
    values = torch.randint(0, 256, (1, 3, 64, 96)).float()
    with torch.no_grad():
        scrfd = dict(zip(Scrfd.names, Scrfd(detector)((values - 127.5) / 128), strict=True))
        yunet = dict(zip(YuNetLayout.names, YuNetLayout(detector)(values.flip(1)), strict=True))
    for stride in STRIDES:
        columns, rows = 96 // stride, 64 // stride
        corners = torch.tensor([[c, r] for r in range(rows) for c in range(columns)]).float() * stride
        box = yunet[f"bbox_{stride}"][0]
        middle, sides = corners + box[:, :2] * stride, box[:, 2:].exp() * stride
        boxes = torch.cat([middle - sides / 2, middle + sides / 2], 1)
        distances = scrfd[f"bbox_{stride}"] * stride
        twice = corners.repeat_interleave(2, 0)
        expected = torch.cat([twice - distances[:, :2], twice + distances[:, 2:]], 1)
        assert_close(boxes.repeat_interleave(2, 0), expected, rtol=1e-4, atol=1e-3)
        assert_close(yunet[f"kps_{stride}"][0].repeat_interleave(2, 0), scrfd[f"kps_{stride}"], rtol=1e-4, atol=1e-4)
        score = (yunet[f"cls_{stride}"] * yunet[f"obj_{stride}"]).sqrt()[0].repeat_interleave(2, 0)
        assert_close(score, scrfd[f"score_{stride}"], rtol=1e-4, atol=1e-5)
