"""Face detectors: an image in, boxes and landmarks of all its faces out, without a gradient.

The landmarks are the eyes, the nose and the corners of the mouth, in this order, left and right as seen in the image.

References:
    Sample and Computation Redistribution for Efficient Face Detection (SCRFD; Guo et al., 2021),
    https://arxiv.org/abs/2105.04714
    YuNet: A Tiny Millisecond-level Face Detector (Wu et al., 2023), https://doi.org/10.1007/s11633-023-1423-y
"""

import os
from abc import ABC, abstractmethod
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from typing_extensions import override

from fairness_dft.files import Location, locate, one_line
from fairness_dft.networks.frozen import FrozenWeights


@dataclass(frozen=True)
class Detections:
    """All faces of one image.

    Attributes:
        boxes: Left, top, right, bottom in pixels, float with shape (M, 4).
        landmarks: x and y of the five landmarks in pixels, float with shape (M, 5, 2).
    """

    boxes: np.ndarray
    landmarks: np.ndarray

    def faces(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return box and landmarks of each face, with shapes (4,) and (5, 2), the largest area first.

        A box without an area, or landmarks that all lie on one point, are not a face.
        """
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        spread = np.ptp(self.landmarks, axis=1).max(1, initial=0.0)
        areas = np.where((sides > 0).all(1) & (spread > 0), np.prod(sides, axis=1), 0)
        areas = np.where(np.isfinite(areas) & np.isfinite(spread), areas, 0)
        return [(self.boxes[i], self.landmarks[i]) for i in np.argsort(-areas, kind="stable") if areas[i] > 0]

    def largest(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the first of `faces`; None if there is no face."""
        return next(iter(self.faces()), None)


class FaceDetector(FrozenWeights, ABC):
    """Detect all faces of an image, outside of any graph; several threads may call it at once."""

    what = "face detector"
    way_out = ""

    @property
    def files(self) -> list[Path]:
        """The files of the loaded weights; cached results are invalid once their content changes."""
        return []

    @abstractmethod
    def detect(self, picture: np.ndarray) -> Detections:
        """Detect the faces of an image: uint8 with shape (H, W, 3), channels blue, green, red."""


class InsightFace(FaceDetector):
    """The detector of an insightface package.

    The weights that insightface offers are for non-commercial research only.

    Args:
        name: A package, which insightface downloads, or a local folder of ONNX files.
        size: Width and height to which images are scaled, both multiples of 32; by default insightface's two, 128 and
            640, since at the larger size it overlooks faces that fill the frame.
        threshold: The lowest score of a face, in (0, 1).

    Example:
        >>> detector = InsightFace("data/portraits/detector", size=(64, 64))
        >>> detector.load()
        >>> detector.detect(np.zeros((64, 64, 3), np.uint8)).boxes.shape
        (0, 4)
    """

    allowed = (
        "a local folder of ONNX files with a detector among them, or a package of insightface where the network can be "
        "reached"
    )
    way_out = "use YuNet"

    def __init__(self, name: str = "buffalo_l", size: tuple[int, int] | None = None, threshold: float = 0.5) -> None:
        if size is not None and any(side < 32 or side % 32 for side in size):
            raise ValueError(f"`size` must be multiples of 32, but got {list(size)}")
        check_threshold(threshold)
        self.name, self.size, self.threshold = name, size if size is None else tuple(size), threshold
        self.path = name

    @override
    def find(self) -> Location:
        location = locate(self.name, local_only=True)
        if not location.reachable and len(Path(self.name).parts) == 1:
            return Location(self.name, None, True)  # a package, which insightface finds or downloads itself
        if not location.reachable:
            raise self.error(location.missing)
        return location

    @override
    def _load(self, location: Location) -> None:
        opencv()
        model = self._analysis(location).det_model
        if not getattr(model, "use_kps", False):
            raise ValueError("it detects no landmarks")
        self._detector = model

    def _analysis(self, location: Location) -> Any:
        """Return insightface's FaceAnalysis, on this process's GPU if onnxruntime was built for one."""
        import onnxruntime
        from filelock import FileLock
        from insightface.app import FaceAnalysis

        providers: list[Any] = ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(os.environ.get("LOCAL_RANK", 0))}))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # several images are examined at the same time
        lock: Any = nullcontext()
        if location.folder is None:
            root = Path("~/.insightface").expanduser()
            root.mkdir(parents=True, exist_ok=True)
            # All processes of a run load it at once, which insightface's download is not made for.
            lock = FileLock(root / "fairness_dft.lock")
        with redirect_stdout(StringIO()), lock:
            analysis = FaceAnalysis(
                location.source, allowed_modules=["detection"], providers=providers, sess_options=options
            )
        analysis.prepare(ctx_id=0, det_thresh=self.threshold, det_size=self.size)
        return analysis

    @property
    @override
    def files(self) -> list[Path]:
        return [Path(self._detector.model_file)]

    @override
    def detect(self, picture: np.ndarray) -> Detections:
        boxes, landmarks = self._detector.detect(picture)
        return Detections(boxes[:, :4], landmarks)


class YuNet(FaceDetector):
    """OpenCV's small detector, whose weights are free for any use (MIT).

    Args:
        path: Its ONNX file, local or as owner/repository/file on the Hugging Face hub.
        size: Longer side in pixels to which larger images are scaled down; it detects faces of 10 to 300 pixels.
        threshold: The lowest score of a face, in (0, 1).

    Example:
        >>> detector = YuNet("data/portraits/yunet.onnx")
        >>> detector.load()
        >>> detector.detect(np.zeros((64, 64, 3), np.uint8)).boxes.shape
        (0, 4)
    """

    allowed = "a local ONNX file of OpenCV's YuNet, or owner/repository/file on the Hugging Face hub"
    single_file = True

    def __init__(
        self,
        path: str = "opencv/face_detection_yunet/face_detection_yunet_2023mar.onnx",
        size: int = 320,
        threshold: float = 0.7,
    ) -> None:
        if size < 32:
            raise ValueError(f"`size` must be at least 32, but got {size}")
        check_threshold(threshold)
        self.path, self.size, self.threshold = path, size, threshold

    @override
    def _load(self, location: Location) -> None:
        cv2, file = opencv(), location.file()
        # No warnings about hardware that nobody asked for.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
        try:
            self._detector = cv2.FaceDetectorYN.create(str(file), "", (320, 320), self.threshold)
        except cv2.error as error:
            raise ValueError("it is not a YuNet of OpenCV") from error
        self._file, self._lock = file, Lock()

    @property
    @override
    def files(self) -> list[Path]:
        return [self._file]

    @override
    def detect(self, picture: np.ndarray) -> Detections:
        import cv2

        scale = min(1.0, self.size / max(picture.shape[:2]))
        if scale < 1:
            picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        with self._lock:  # the detector keeps the size of the image
            self._detector.setInputSize(picture.shape[1::-1])
            rows = self._detector.detect(picture)[1]
        rows = np.zeros((0, 15), np.float32) if rows is None else rows / scale
        boxes = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], axis=1)
        return Detections(boxes, rows[:, 4:14].reshape(-1, 5, 2))


def opencv() -> Any:
    """Return OpenCV, which needs a system library that servers may lack.

    Raises:
        ValueError: If it cannot be imported.
    """
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            f"OpenCV could not be imported, {one_line(error)}: install the system's libgl1 and libglib2.0-0, or "
            "opencv-python-headless in place of opencv-python"
        ) from error
    return cv2


def check_threshold(threshold: float) -> None:
    """Refuse a threshold outside of (0, 1).

    Raises:
        ValueError: If it is.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` must be above 0 and below 1, but got {threshold}")
