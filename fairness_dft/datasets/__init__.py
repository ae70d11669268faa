"""Labeled face images, from which classifiers learn."""

from fairness_dft.datasets.base import LabelledFaces, LabelledFolder
from fairness_dft.datasets.faces import CelebA, FairFace, UTKFace

__all__ = ["CelebA", "FairFace", "LabelledFaces", "LabelledFolder", "UTKFace"]
