"""Face finders: crops against slices and OpenCV, alignment against insightface, and who is found at all."""

import cv2
import numpy as np
import pytest
import torch
from faces_world import SCRFD, YUNET, bgr
from torch.testing import assert_close

from fairness_dft.faces.crops import aligned_faces, similarity_transforms, square_crops
from fairness_dft.faces.detectors import Detections, FaceDetector, InsightFace, YuNet
from fairness_dft.faces.finders import DetectedFaces, WholeFrame, threads, whole_frame_boxes
from fairness_dft.portraits.detector import FacePictures, draw_faces

DETECTORS = {
    "insightface": lambda **settings: InsightFace(SCRFD, size=(64, 64), **settings),
    "yunet": lambda **settings: YuNet(YUNET, **settings),
}


@pytest.fixture(scope="module")
def drawn() -> FacePictures:
    return draw_faces(60, seed=99)


class Blind(FaceDetector):
    """Sees no face, but counts the pictures that it was asked about."""

    asked = 0

    def load(self) -> None:
        self.loaded = True

    def detect(self, picture: np.ndarray) -> Detections:
        self.asked += 1
        return Detections(np.zeros((0, 4)), np.zeros((0, 5, 2)))


class BrightSpot(FaceDetector):
    """Sees a face where a picture is bright; needs no library."""

    def load(self) -> None:
        pass

    def detect(self, picture: np.ndarray) -> Detections:
        rows, columns = np.nonzero(picture.mean(-1) > 127)
        if not len(rows):
            return Detections(np.zeros((0, 4)), np.zeros((0, 5, 2)))
        left, top, right, bottom = box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        eyes, mouth = top + 0.35 * (bottom - top), top + 0.75 * (bottom - top)
        points = [(0.3, eyes), (0.7, eyes), (0.5, (eyes + mouth) / 2), (0.35, mouth), (0.65, mouth)]
        landmarks = [(left + x * (right - left), y) for x, y in points]
        return Detections(np.array([box], dtype=float), np.array([landmarks]))


class TestWholeFrame:
    @pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 3, 1, 1), (3, 3, 5, 7)])
    def test_is_a_face_of_every_image(self, shape: tuple[int, ...]) -> None:
        images = torch.rand(shape)
        finder = WholeFrame()
        finder.load()
        faces = finder(images)
        assert faces.has_face.dtype == torch.bool and faces.has_face.tolist() == [True] * shape[0]
        assert faces.boxes.tolist() == [[0, 0, shape[3], shape[2]]] * shape[0]
        assert faces.landmarks is None
        assert_close(faces.crops, images)

    def test_passes_gradients_to_the_image(self) -> None:
        images = torch.rand(2, 3, 4, 4, requires_grad=True)
        WholeFrame()(images).crops.sum().backward()
        assert_close(images.grad, torch.ones_like(images))

    def test_boxes_take_precision_and_place_from_the_images(self) -> None:
        assert whole_frame_boxes(torch.rand(2, 3, 4, 4, dtype=torch.float64)).dtype == torch.float64


class TestSquareCrops:
    def test_box_of_the_whole_image_gives_the_image(self) -> None:
        images = torch.rand(2, 3, 16, 16)
        assert_close(square_crops(images, whole_frame_boxes(images), 16, margin=0), images)

    @pytest.mark.parametrize(
        "box", [(8, 8, 16, 16), (2, 4, 10, 8), (-3, 10, 5, 14), (20, 26, 28, 34), (-8, -8, 40, 40)]
    )
    def test_equals_a_slice_of_the_image_continued_at_its_edge(self, box: tuple[int, ...]) -> None:
        images = torch.rand(1, 3, 32, 32)
        left, top, right, bottom = box
        half = (right - left) * 3 // 4  # half of the side of a crop with a margin of 0.5
        x, y = (left + right) // 2, (top + bottom) // 2
        padded = np.pad(images[0].numpy(), ((0, 0), (64, 64), (64, 64)), mode="edge")
        expected = padded[:, 64 + y - half : 64 + y + half, 64 + x - half : 64 + x + half]
        crops = square_crops(images, torch.tensor([box]).float(), 2 * half)
        assert_close(crops[0], torch.from_numpy(expected), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("size", [12, 20, 31])
    def test_scales_up_as_opencv_does(self, size: int) -> None:
        images = torch.rand(1, 3, 20, 20)
        slice_ = images[0, :, 4:14, 6:16].permute(1, 2, 0).numpy()
        box = torch.tensor([[6.0, 4.0, 16.0, 14.0]])
        crops = square_crops(images, box, size, margin=0)
        expected = torch.from_numpy(cv2.resize(slice_, (size, size), interpolation=cv2.INTER_LINEAR))
        inner = slice(size // 10 + 1, -(size // 10) - 1)  # at its own edge the slice knows no neighbors
        assert_close(crops[0, :, inner, inner].permute(1, 2, 0), expected[inner, inner], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("factor", [2, 4, 6])
    def test_scales_down_by_averaging(self, factor: int) -> None:
        images = torch.rand(1, 3, 4 * factor, 4 * factor, requires_grad=True)
        crops = square_crops(images, whole_frame_boxes(images), 4, margin=0)
        assert_close(crops, torch.nn.functional.avg_pool2d(images, factor))
        crops.sum().backward()
        assert_close(images.grad, torch.full_like(images, 1 / factor**2))

    def test_gradient_equals_finite_differences(self) -> None:
        images = torch.rand(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
        boxes = torch.tensor([[1.2, 0.7, 4.1, 5.2], [-1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda images: square_crops(images, boxes, 4), images)

    @pytest.mark.parametrize("autocast", [False, True])
    def test_place_is_exact_in_half_precision(self, autocast: bool) -> None:
        ramp = torch.linspace(0, 1, 512)[None, None, None].expand(1, 3, 512, 512).bfloat16()
        box = torch.tensor([[401.0, 301.0, 403.0, 303.0]])  # bfloat16 holds 400 and 402, but not 401
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            crops = square_crops(ramp, box, 2, margin=0)
        assert crops.dtype == torch.bfloat16
        assert_close(crops[0, 0, 0], ramp[0, 0, 0, 401:403], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`estimate` is deprecated:FutureWarning")  # insightface's call
class TestAlignment:
    def test_transforms_are_those_of_insightface(self) -> None:
        from insightface.utils.face_align import arcface_dst, estimate_norm

        random = np.random.default_rng(0)
        points = arcface_dst + random.normal(0, 6, (8, 5, 2))
        turn = np.array([[0.6, -0.8], [0.8, 0.6]])
        points[4:] = points[4:] @ turn * 3 + 50
        ours = similarity_transforms(torch.from_numpy(points), torch.from_numpy(arcface_dst).double())
        theirs = np.stack([estimate_norm(p) for p in points])
        assert_close(ours, torch.from_numpy(theirs), rtol=1e-5, atol=1e-4)

    def test_faces_are_those_of_insightface(self, drawn: FacePictures) -> None:
        from insightface.utils.face_align import norm_crop

        images = drawn.images(drawn.present)[:6]
        landmarks = drawn.landmarks[drawn.present][:6]
        ours = bgr(aligned_faces(images, landmarks))
        theirs = np.stack([norm_crop(p, at.numpy()) for p, at in zip(bgr(images), landmarks, strict=True)])
        # OpenCV's coordinates are multiples of 1/32 of a pixel.
        assert np.abs(ours.astype(int) - theirs).mean() < 1
        assert_close(aligned_faces(images, landmarks, 224).shape, torch.Size((6, 3, 224, 224)))

    def test_faces_of_128_pixels_leave_room_as_insightface_does(self) -> None:
        from insightface.utils.face_align import estimate_norm

        images, landmarks = torch.rand(1, 3, 200, 200), np.random.default_rng(0).uniform(40, 160, (5, 2))
        shift = torch.from_numpy(estimate_norm(landmarks, 128))
        ours = aligned_faces(images, torch.from_numpy(landmarks)[None].float(), 128)
        theirs = cv2.warpAffine(images[0].permute(1, 2, 0).numpy(), shift.numpy(), (128, 128))
        assert (ours[0].permute(1, 2, 0) - torch.from_numpy(theirs)).abs().mean() < 0.02

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_place_is_exact_under_autocast(self, dtype: torch.dtype) -> None:
        images = torch.rand(1, 3, 512, 512)
        landmarks = torch.tensor([[[411.0, 301], [455, 304], [431, 329], [413, 352], [449, 355]]])
        expected = aligned_faces(images, landmarks)
        with torch.autocast("cpu", dtype):
            assert_close(aligned_faces(images, landmarks), expected)

    def test_gradient_equals_finite_differences(self) -> None:
        images = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
        landmarks = torch.tensor([[[2.0, 2.5], [5.2, 2.2], [3.6, 4.1], [2.4, 6.0], [4.9, 5.8]]], dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda images: aligned_faces(images, landmarks, 5), images)


class TestDetectedFaces:
    def finder(self, *detectors: FaceDetector, size: int = 48) -> DetectedFaces:
        finder = DetectedFaces(detectors, size=size)
        finder.load()
        return finder

    def test_crops_and_mask(self, drawn: FacePictures) -> None:
        images = drawn.images(slice(None)).requires_grad_()
        faces = self.finder(DETECTORS["insightface"]())(images)
        assert faces.has_face.tolist() == drawn.present.tolist()
        assert faces.crops.shape == (60, 3, 48, 48)
        here = drawn.present
        assert (faces.boxes - drawn.boxes)[here].abs().mean() < 1.5
        assert (faces.landmarks - drawn.landmarks)[here].abs().mean() < 1
        assert_close(faces.crops, square_crops(images, faces.boxes, 48))
        assert_close(faces.boxes[~here], whole_frame_boxes(images)[~here])
        faces.crops.sum().backward()
        assert images.grad.isfinite().all() and (images.grad.abs().sum((1, 2, 3)) > 0).all()

    @pytest.mark.gpu
    def test_faces_on_a_gpu_are_those_on_the_cpu(self) -> None:
        """Also where the GPU is still busy with other work when the search begins and goes on meanwhile."""
        images, finder = torch.zeros(12, 3, 64, 64), self.finder(BrightSpot())
        for i, image in enumerate(images[1:]):
            image[:, 2 * i : 2 * i + 20, 3 * i : 3 * i + 15] = 0.7 + 0.02 * i
        wanted, busy = finder(images), torch.rand(2048, 2048, device="cuda")
        for _ in range(20):
            busy = busy @ busy / 2048
        find = finder.submit(images.cuda() + 0 * busy[0, 0])
        busy @ busy
        faces = find()
        assert faces.has_face.tolist() == wanted.has_face.tolist() == [False] + [True] * 11 and faces.crops.is_cuda
        assert_close(faces.boxes.cpu(), wanted.boxes, atol=1e-3, rtol=0)
        assert_close(faces.crops.cpu(), wanted.crops, atol=1e-3, rtol=0)

    def test_later_detectors_are_asked_where_the_first_saw_nothing(self, drawn: FacePictures) -> None:
        images, blind, last = drawn.images(slice(None)), Blind(), Blind()
        faces = self.finder(blind, DETECTORS["yunet"](), last)(images)
        assert faces.has_face.tolist() == drawn.present.tolist()
        assert (blind.asked, last.asked) == (60, int((~drawn.present).sum()))

    def test_every_face_is_found(self, drawn: FacePictures) -> None:
        """Of two portraits side by side both, of one that one; where there is none, a row that the mask leaves out."""
        one, two = (int(i) for i in drawn.present.nonzero().flatten()[:2])
        nobody = int((~drawn.present).nonzero()[0])
        images = drawn.images(slice(None))
        pairs = [(one, two), (one, nobody), (nobody, nobody)]
        wide = torch.stack([torch.cat([images[left], images[right]], dim=2) for left, right in pairs])
        finder = DetectedFaces([InsightFace(SCRFD, size=(128, 128))], size=32)
        finder.load()
        faces, owners = finder.every(wide)
        assert owners.tolist() == [0, 0, 1, 2] and faces.has_face.tolist() == [True, True, True, False]
        expected = [drawn.boxes[one], drawn.boxes[two] + torch.tensor([64, 0, 64, 0]), drawn.boxes[one]]
        found = sorted(faces.boxes[:2].tolist()), faces.boxes[2]
        assert_close(torch.tensor(found[0]), torch.stack(expected[:2]), rtol=0, atol=2.5)
        assert_close(found[1], expected[2], rtol=0, atol=2.5)
        largest = finder(wide)
        areas = (faces.boxes[:2, 2:] - faces.boxes[:2, :2]).prod(1)
        assert areas[0] >= areas[1] and torch.equal(largest.boxes, faces.boxes[[0, 2, 3]])
        assert torch.equal(largest.crops, faces.crops[[0, 2, 3]])
        single, owner = WholeFrame().every(images)
        assert owner.tolist() == list(range(len(images))) and torch.equal(single.crops, images)

    @pytest.mark.parametrize("count", [0, 3])
    def test_no_face_at_all(self, count: int) -> None:
        images = torch.rand(count, 3, 40, 64, requires_grad=True)
        faces = self.finder(Blind())(images)
        assert faces.has_face.tolist() == [False] * count
        aligned = aligned_faces(images, faces.landmarks)
        (faces.crops.sum() + aligned.sum()).backward()
        assert images.grad.isfinite().all()

    def test_settings_that_cannot_work_are_refused(self) -> None:
        with pytest.raises(ValueError, match="`detectors` must not be empty"):
            DetectedFaces([])
        for settings in ({"margin": -0.1}, {"size": 0}):
            with pytest.raises(ValueError, match="`margin` must not be negative and `size` at least 1"):
                DetectedFaces([Blind()], **settings)

    def test_broken_images_are_looked_at_as_black(self, drawn: FacePictures) -> None:
        images = drawn.images(drawn.present)[:2]
        images[0] = float("nan")
        faces = self.finder(DETECTORS["insightface"]())(images)
        assert faces.has_face.tolist() == [False, True]
        assert faces.boxes.isfinite().all()


def test_pictures_are_looked_at_by_a_share_of_the_cores(monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    for variable in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun does
    assert threads() == 12
    monkeypatch.setenv("WORLD_SIZE", "24")
    assert threads() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert threads() == 3
