"""Classifiers in Hugging Face's image-classification layout, and the face finder that asks one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fairness_dft.classifiers.base import AttributeClassifier
from fairness_dft.faces.finders import FaceFinder, Faces, whole_frame_boxes
from fairness_dft.files import Location, quiet
from fairness_dft.networks.frozen_layers import forget_inputs
from fairness_dft.networks.preprocessing import Preprocessing

FACE_HEAD, FACE_PRESENT = "face", "present"


class ImageClassifier(AttributeClassifier):
    """A classifier in Hugging Face's image-classification layout.

    Args:
        path: Folder of an `AutoModelForImageClassification` with its preprocessor_config.json.
        attribute: Name of the head of a classifier whose labels name none.

    Example:
        >>> classifier = ImageClassifier("data/portraits/classifier_training")
        >>> classifier.load()
        >>> classifier.heads["gender"]
        ('man', 'woman')
        >>> classifier(torch.zeros(2, 3, 64, 64))["gender"].shape
        torch.Size([2, 2])
    """

    allowed = "a folder in Hugging Face's image-classification layout"
    required_files = ("config.json", "preprocessor_config.json")
    local_only = True
    network: Any
    preprocessing: Preprocessing

    def __init__(self, path: str, attribute: str = "gender") -> None:
        super().__init__()
        self.path, self.attribute = path, attribute

    @override
    def _load(self, location: Location) -> None:
        from transformers import AutoModelForImageClassification

        preprocessing = Preprocessing.from_file(location.file("preprocessor_config.json"))
        with quiet():
            network, report = AutoModelForImageClassification.from_pretrained(
                location.source, dtype=torch.float32, output_loading_info=True, **location.options
            )
        if report["missing_keys"]:  # such as the head of a bare backbone, which would be random
            missing = ", ".join(sorted(report["missing_keys"]))
            raise ValueError(f"it is not an image classifier: its weights lack {missing}")
        forget_inputs(network.requires_grad_(False))
        self.network, self.preprocessing = network, preprocessing
        self.columns = columns_of_heads(network.config.id2label, self.attribute)
        self.heads = {head: tuple(columns) for head, columns in self.columns.items()}

    @override
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.network(self.preprocessing(images)).logits.to(images.dtype)
        return {head: logits[:, list(columns.values())] for head, columns in self.columns.items()}


def columns_of_heads(id2label: Mapping[int | str, str], attribute: str) -> dict[str, dict[str, int]]:
    """Return which logit belongs to which class of which head, in the order of the logits.

    Args:
        id2label: The label of each logit, as in a Hugging Face config.
        attribute: Name of the head where the labels name none.

    Returns:
        For each head the column of each class.

    Example:
        >>> columns_of_heads({0: "gender/woman", 1: "gender/man", 2: "age/young", 3: "age/old"}, "")
        {'gender': {'woman': 0, 'man': 1}, 'age': {'young': 2, 'old': 3}}
    """
    named = all("/" in label for label in id2label.values())
    heads: dict[str, dict[str, int]] = {}
    for column, label in sorted((int(column), label) for column, label in id2label.items()):
        head, _, name = label.partition("/") if named else (attribute, "/", label)
        heads.setdefault(head, {})[name] = column
    return heads


class FacePresence(FaceFinder):
    """Take whole frames as faces; a classifier's own output "face/present" says which of them show a face.

    Args:
        path: Folder of a classifier with the labels "face/absent" and "face/present".

    Example:
        >>> finder = FacePresence("data/portraits/classifier_evaluation")
        >>> finder.load()
        >>> finder(torch.zeros(2, 3, 64, 64)).has_face.shape
        torch.Size([2])
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.classifier = ImageClassifier(path)

    @override
    def check(self) -> None:
        self.classifier.check()

    @override
    def load(self) -> None:
        """Load the classifier.

        Raises:
            ValueError: If it cannot be loaded, or has no head that says whether a face is present.
        """
        self.classifier.load()
        if FACE_PRESENT not in self.classifier.heads.get(FACE_HEAD, ()):
            raise self.classifier.error(f"it has no label {FACE_HEAD}/{FACE_PRESENT}")

    @override
    def forward(self, images: Tensor) -> Faces:
        """Return the images themselves, and whether the classifier sees a face in each."""
        with torch.no_grad():
            logits = self.classifier(images)
        return Faces(images, whole_frame_boxes(images), self.present(logits))

    def present(self, logits: dict[str, Tensor]) -> Tensor:
        """Return whether the classifier, by its logits, sees a face: bool with shape (N,)."""
        return logits[FACE_HEAD].argmax(-1) == self.classifier.heads[FACE_HEAD].index(FACE_PRESENT)
