"""Classifiers in Hugging Face's image-classification layout, and the face finder that asks one."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from fairness_dft.classifiers.base import AttributeClassifier
from fairness_dft.faces.finders import FaceFinder, Faces, whole_frame_boxes
from fairness_dft.files import quiet, resolve
from fairness_dft.networks.frozen_layers import forget_inputs
from fairness_dft.networks.preprocessing import Preprocessing

FACE_HEAD, FACE_PRESENT = "face", "present"


class ImageClassifier(AttributeClassifier):
    """A classifier in Hugging Face's image-classification layout.

    Args:
        path: folder of an `AutoModelForImageClassification` with its preprocessor_config.json.
        attribute: name of the head of a classifier whose labels name none.
    """

    def __init__(self, path: str, attribute: str = "gender") -> None:
        super().__init__()
        self.path, self.attribute = path, attribute

    def load(self) -> None:
        """Load the weights, freeze them and read the heads from the labels.

        Raises:
            ValueError: if the folder holds no image classifier.
        """
        from transformers import AutoModelForImageClassification

        if self.heads:
            return
        folder = classifier_folder(self.path)
        self.preprocessing = Preprocessing.from_file(folder / "preprocessor_config.json")
        try:
            with quiet():
                network, found = AutoModelForImageClassification.from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
                )
        except Exception as error:  # each file format raises its own
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"the classifier {self.path!r} could not be loaded: {reason}") from error
        if found["missing_keys"]:  # such as the head of a bare backbone, which would be random
            missing = ", ".join(sorted(found["missing_keys"]))
            raise ValueError(f"the classifier {self.path!r} is no image classifier: its weights lack {missing}")
        self.network = network.requires_grad_(False).eval()
        forget_inputs(self.network)
        self.columns = columns_of_heads(network.config.id2label, self.attribute)
        self.heads = {head: tuple(columns) for head, columns in self.columns.items()}

    @override
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.network(self.preprocessing(images)).logits.to(images.dtype)
        return {head: logits[:, list(columns.values())] for head, columns in self.columns.items()}


def columns_of_heads(id2label: Mapping[int | str, str], attribute: str) -> dict[str, dict[str, int]]:
    """Which logit belongs to which class of which head, in the order of the logits.

    Args:
        id2label: the label of each logit, as in a Hugging Face config.
        attribute: name of the head where the labels name none.
    """
    named = all("/" in label for label in id2label.values())
    heads: dict[str, dict[str, int]] = {}
    for column, label in sorted((int(column), label) for column, label in id2label.items()):
        head, _, name = label.partition("/") if named else (attribute, "/", label)
        heads.setdefault(head, {})[name] = column
    return heads


def classifier_folder(path: str) -> Path:
    """The local folder of a classifier.

    Raises:
        ValueError: if it is not there or is no image classifier with its preprocessing.
    """
    folder = resolve(path)
    for file in ("config.json", "preprocessor_config.json"):
        if not (folder / file).is_file():
            raise ValueError(
                f"the classifier {path!r} has no {file}: give a folder in Hugging Face's "
                "image-classification layout, or run on the miniature with "
                "--config experiments/parts/portraits.yaml"
            )
    return folder


class FacePresence(FaceFinder):
    """Whole frames; a classifier's own "face/present" output says which of them show a face.

    Args:
        path: folder of a classifier with the labels "face/absent" and "face/present".
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.classifier = ImageClassifier(path)

    def load(self) -> None:
        """Load the classifier.

        Raises:
            ValueError: if it has no head that says whether a face is present.
        """
        self.classifier.load()
        if FACE_PRESENT not in self.classifier.heads.get(FACE_HEAD, ()):
            raise ValueError(f"the classifier {self.classifier.path!r} has no label {FACE_HEAD}/{FACE_PRESENT}")

    def forward(self, images: Tensor) -> Faces:
        """The images themselves, and whether the classifier sees a face."""
        with torch.no_grad():
            logits = self.classifier(images)
        return Faces(images, whole_frame_boxes(images), self.present(logits))

    def present(self, logits: dict[str, Tensor]) -> Tensor:
        """Whether the classifier, by its logits, sees a face: bool with shape (N,)."""
        return logits[FACE_HEAD].argmax(-1) == self.classifier.heads[FACE_HEAD].index(FACE_PRESENT)
