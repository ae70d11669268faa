"""Faces in images: detection, differentiable crops, and how real they look."""

from fairness_dft.faces.detectors import FaceDetector, InsightFace, YuNet
from fairness_dft.faces.finders import DetectedFaces, FaceFinder, WholeFrame
from fairness_dft.faces.realism import FaceEmbedding, FaceRealism

__all__ = [
    "DetectedFaces",
    "FaceDetector",
    "FaceEmbedding",
    "FaceFinder",
    "FaceRealism",
    "InsightFace",
    "WholeFrame",
    "YuNet",
]
