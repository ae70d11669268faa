"""Face detectors: a picture in, boxes and landmarks of all its faces out, without a gradient.

The landmarks are the eyes, the nose and the corners of the mouth, in this order, left and right as seen in the picture.

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
from types import ModuleType
from typing import Any

import numpy as np
from typing_extensions import override

from fairness_dft.files import file_or_hub, one_line, resolve


@dataclass(frozen=True)
class Detections:
    """All faces of one picture.

    Attributes:
        boxes: left, top, right, bottom in pixels, float with shape (M, 4).
        landmarks: x and y of the five landmarks in pixels, float with shape (M, 5, 2).
    """

    boxes: np.ndarray
    landmarks: np.ndarray

    def faces(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Box and landmarks of each face, with shapes (4,) and (5, 2), by their area, the largest first.

        Boxes without an area, and landmarks that all lie on one point, are no face.
        """
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        spread = np.ptp(self.landmarks, axis=1).max(1, initial=0.0)
        areas = np.where((sides > 0).all(1) & (spread > 0), np.prod(sides, axis=1), 0)
        areas = np.where(np.isfinite(areas) & np.isfinite(spread), areas, 0)
        return [(self.boxes[i], self.landmarks[i]) for i in np.argsort(-areas, kind="stable") if areas[i] > 0]

    def largest(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The first of `faces`; None without a face."""
        return next(iter(self.faces()), None)


class FaceDetector(ABC):
    """Finds all faces of a picture, outside of any graph; it may be called from several threads."""

    @abstractmethod
    def load(self) -> None:
        """Load the weights; the constructor loads nothing.

        Raises:
            ValueError: if they are not there, or not a face detector's.
        """

    @property
    def files(self) -> list[Path]:
        """The files of the weights, once loaded: what is remembered of images is forgotten where they change."""
        return []

    @abstractmethod
    def detect(self, picture: np.ndarray) -> Detections:
        """Find the faces of a picture: uint8 with shape (H, W, 3), blue, green, red."""


class InsightFace(FaceDetector):
    """The detector of an insightface package.

    The weights that insightface offers are for non-commercial research only.

    Args:
        name: a package, which insightface downloads, or a local folder of ONNX files.
        size: width and height at which it looks at pictures, both multiples of 32; by default insightface's two, 128
            and 640, since at the larger one it overlooks faces that fill the frame.
        threshold: the lowest score of a face, in (0, 1).
    """

    def __init__(self, name: str = "buffalo_l", size: tuple[int, int] | None = None, threshold: float = 0.5) -> None:
        if size is not None and any(side < 32 or side % 32 for side in size):
            raise ValueError(f"`size` must be multiples of 32, but got {list(size)}")
        check_threshold(threshold)
        self.name, self.size, self.threshold = name, size if size is None else tuple(size), threshold

    @override
    def load(self) -> None:
        if hasattr(self, "_detector"):
            return
        opencv()
        folder = resolve(self.name)
        if not folder.is_dir() and len(Path(self.name).parts) > 1:
            raise ValueError(f"the face detector {self.name!r} could not be loaded: there is no such folder")
        try:
            analysis = self._analysis(str(folder) if folder.is_dir() else self.name)
        except Exception as error:  # of the network, onnxruntime or insightface's own assertions
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            raise ValueError(
                f"the face detector {self.name!r} could not be loaded ({reason}): give a local folder of ONNX files "
                "with a detector among them, a package of insightface where the network can be reached, or take YuNet"
            ) from error
        if not getattr(analysis.det_model, "use_kps", False):
            raise ValueError(f"the face detector {self.name!r} finds no landmarks: choose one that does")
        self._detector = analysis.det_model

    def _analysis(self, name: str) -> Any:
        """FaceAnalysis of insightface, on this process's GPU if onnxruntime was built for one."""
        import onnxruntime
        from filelock import FileLock
        from insightface.app import FaceAnalysis

        providers: list[Any] = ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(os.environ.get("LOCAL_RANK", 0))}))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # pictures are looked at side by side
        lock: Any = nullcontext()
        if not Path(name).is_dir():
            root = Path("~/.insightface").expanduser()
            root.mkdir(parents=True, exist_ok=True)
            # All processes of a run load it at once, and insightface's download does not expect that.
            lock = FileLock(root / "fairness_dft.lock")
        with redirect_stdout(StringIO()), lock:
            analysis = FaceAnalysis(name, allowed_modules=["detection"], providers=providers, sess_options=options)
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
        path: its ONNX file, local or as owner/repository/file on the Hugging Face hub.
        size: longer side in pixels to which larger pictures are scaled down; it finds faces of 10 to 300 pixels.
        threshold: the lowest score of a face, in (0, 1).
    """

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
    def load(self) -> None:
        if hasattr(self, "_detector"):
            return
        cv2 = opencv()
        file = file_or_hub(self.path)
        cv2.utils.logging.setLogLevel(
            cv2.utils.logging.LOG_LEVEL_ERROR
        )  # no warnings of hardware that is not asked for
        try:
            self._detector = cv2.FaceDetectorYN.create(str(file), "", (320, 320), self.threshold)
        except cv2.error as error:
            raise ValueError(
                f"the face detector {self.path!r} could not be loaded: it is no YuNet of OpenCV"
            ) from error

        self._lock = Lock()

    @property
    @override
    def files(self) -> list[Path]:
        return [Path(file_or_hub(self.path))]

    @override
    def detect(self, picture: np.ndarray) -> Detections:
        import cv2

        scale = min(1.0, self.size / max(picture.shape[:2]))
        if scale < 1:
            picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        with self._lock:  # it keeps the size of the picture
            self._detector.setInputSize(picture.shape[1::-1])
            found = self._detector.detect(picture)[1]
        found = np.zeros((0, 15), np.float32) if found is None else found / scale
        boxes = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:4]], axis=1)
        return Detections(boxes, found[:, 4:14].reshape(-1, 5, 2))


def opencv() -> ModuleType:
    """OpenCV, which needs a system library that servers may lack.

    Raises:
        ValueError: if it cannot be imported.
    """
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            f"OpenCV could not be imported ({one_line(error)}): install the system's libgl1 and libglib2.0-0, or "
            "opencv-python-headless in place of opencv-python"
        ) from error
    return cv2


def check_threshold(threshold: float) -> None:
    """Refuse a threshold outside of (0, 1).

    Raises:
        ValueError: if it is.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` must be above 0 and below 1, but got {threshold}")
