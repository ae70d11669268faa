"""The attribute classifier h: face crops to class probabilities, its training and its calibration."""

from fairness_dft.classifiers.base import AttributeClassifier
from fairness_dft.classifiers.image_classifier import FacePresence, ImageClassifier
from fairness_dft.classifiers.judge import Judge

__all__ = ["AttributeClassifier", "FacePresence", "ImageClassifier", "Judge"]
