"""Face detectors, by the libraries' own code, on drawn faces."""

import pickle
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from faces_world import SCRFD, YUNET, bgr

from fairness_dft.faces.detectors import Detections, FaceDetector, InsightFace, YuNet
from fairness_dft.portraits.detector import FacePictures, detection_figures, draw_faces, overlap

DETECTORS = {
    "insightface": lambda **settings: InsightFace(SCRFD, **{"size": (64, 64), **settings}),
    "yunet": lambda **settings: YuNet(YUNET, **settings),
}
every_detector = pytest.mark.parametrize("kind", DETECTORS)


def loaded(kind: str, **settings: object) -> FaceDetector:
    detector = DETECTORS[kind](**settings)
    detector.load()
    return detector


@pytest.fixture(scope="module")
def drawn() -> FacePictures:
    return draw_faces(60, seed=99)


@pytest.fixture(scope="module")
def one(drawn: FacePictures) -> tuple[np.ndarray, np.ndarray]:
    """A picture with a face, and its box."""
    first = int(drawn.present.nonzero()[0])
    return bgr(drawn.images(slice(first, first + 1)))[0], drawn.boxes[first].numpy()


@every_detector
def test_finds_the_drawn_faces(drawn: FacePictures, kind: str) -> None:
    figures = detection_figures(loaded(kind), drawn, drawn.images(slice(None)))
    assert figures["recall"] >= 0.98 and figures["precision"] >= 0.98 and figures["landmark_error"] < 1


@every_detector
def test_any_shape_of_picture(one: tuple[np.ndarray, np.ndarray], kind: str) -> None:
    picture, box = one
    wide = np.full((64, 128, 3), 128, np.uint8)
    wide[:, 40:104] = picture
    detector = loaded(kind, **({"size": (128, 64)} if kind == "insightface" else {}))
    found = detector.detect(wide).largest()
    assert found is not None
    assert overlap(found[0], box + [40, 0, 40, 0]) > 0.7


@every_detector
def test_faces_of_large_pictures_are_found_at_the_size_that_a_detector_knows(
    one: tuple[np.ndarray, np.ndarray], kind: str
) -> None:
    picture, box = one
    large = cv2.resize(picture, (512, 512), interpolation=cv2.INTER_LINEAR)
    size = (64, 64) if kind == "insightface" else 64
    box_found, landmarks = loaded(kind, size=size).detect(large).largest()
    assert overlap(box_found, box * 8) > 0.7
    inside = (landmarks > box[:2] * 8) & (landmarks < box[2:] * 8)
    assert inside.all()
    if kind == "yunet":  # at full size its largest cells are too small for this face
        assert loaded(kind, size=512).detect(large).largest() is None


def test_insightface_looks_at_both_of_its_sizes_unless_told() -> None:
    assert loaded("insightface", size=None)._detector.input_sizes == [(128, 128), (640, 640)]
    assert loaded("insightface", size=(96, 64))._detector.input_sizes == [(96, 64)]


@every_detector
def test_no_face_is_an_empty_answer(kind: str) -> None:
    found = loaded(kind).detect(np.full((64, 64, 3), 200, np.uint8))
    assert found.boxes.shape == (0, 4) and found.landmarks.shape == (0, 5, 2)
    assert found.largest() is None


@every_detector
def test_loads_once_and_travels_to_other_processes(kind: str) -> None:
    detector = pickle.loads(pickle.dumps(DETECTORS[kind]()))
    detector.load()
    first = detector._detector
    detector.load()
    assert detector._detector is first


def test_yunet_with_a_fixed_input_as_opencv_offers_it(one: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    model = onnx.load(YUNET)
    for axis, side in ((2, 64), (3, 64)):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = side
    onnx.save(model, tmp_path / "fixed.onnx")
    detector = YuNet(str(tmp_path / "fixed.onnx"))
    detector.load()
    assert overlap(detector.detect(one[0]).largest()[0], one[1]) > 0.7


def test_what_is_no_detector_is_refused_in_one_line(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "give a local folder of ONNX files"), (tmp_path / "x", "no folder of this name")):
        with pytest.raises(ValueError, match=f"face detector .* could not be loaded.*{message}") as error:
            InsightFace(str(path)).load()
        assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError, match="'missing.onnx' could not be loaded .there is no file of this name.: give a local ONNX"
    ):
        YuNet("missing.onnx").load()
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    with pytest.raises(ValueError, match="could not be loaded .it is not a YuNet"):
        YuNet(str(tmp_path / "broken.onnx")).load()


@every_detector
def test_missing_system_libraries_are_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="OpenCV could not be imported, .*: install the system's libgl1 .* or opencv-"):
        DETECTORS[kind]().load()


def test_detector_without_landmarks_is_refused(tmp_path: Path) -> None:
    model = onnx.load(Path(SCRFD) / "scrfd.onnx")
    del model.graph.output[6:]
    onnx.save(model, tmp_path / "boxes.onnx")
    with pytest.raises(ValueError, match="it detects no landmarks"):
        InsightFace(str(tmp_path)).load()


def test_settings_that_cannot_work_are_refused() -> None:
    for threshold in (0.0, 1.0, float("nan")):
        for kind in (InsightFace, YuNet):
            with pytest.raises(ValueError, match="`threshold` must be above 0 and below 1"):
                kind(threshold=threshold)
    with pytest.raises(ValueError, match=r"`size` must be multiples of 32, but got \[64, 100\]"):
        InsightFace(size=(64, 100))
    with pytest.raises(ValueError, match="`size` must be at least 32, but got 10"):
        YuNet(size=10)


def test_the_largest_face_is_taken() -> None:
    boxes = np.array([[0, 0, 4, 4], [10, 10, 20, 13], [5, 5, 10, 10.0]])
    landmarks = np.arange(30.0).reshape(3, 5, 2)
    box, points = Detections(boxes, landmarks).largest()
    assert box.tolist() == boxes[1].tolist()
    assert points.tolist() == landmarks[1].tolist()


@pytest.mark.parametrize("odd", ["inside out", "flat", "nan", "infinite", "one point"])
def test_what_cannot_be_a_face_is_none(odd: str) -> None:
    boxes, landmarks = np.array([[10.0, 10, 90, 90], [5, 5, 9, 9]]), np.arange(20.0).reshape(2, 5, 2)
    if odd == "one point":
        landmarks[0] = 7
    else:
        changed = {"inside out": [90, 90, 10, 10], "flat": [10, 10, 90, 10], "nan": [np.nan] * 4}
        boxes[0] = changed.get(odd, [0, 0, np.inf, 9])
    box, _ = Detections(boxes, landmarks).largest()
    assert box.tolist() == [5, 5, 9, 9]
    assert Detections(boxes[:1], landmarks[:1]).largest() is None
