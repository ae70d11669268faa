"""h, the frozen attribute classifiers: face crops in, one distribution p = softmax(h(x)) an attribute out.

A classifier is a folder in Hugging Face's image-classification layout. Several attributes share one network
as heads: a label "gender/woman" is the class *woman* of the head *gender*. Unless all labels name a head, there
is one, named by `attribute`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import final, override

from fairness_dft.attributes import attributes_of
from fairness_dft.faces import FaceFinder, Faces, WholeFrame, whole_frame_boxes
from fairness_dft.frozen_layers import forget_inputs
from fairness_dft.loading import quiet, resolve
from fairness_dft.preprocessing import Preprocessing

FACE_HEAD, FACE_PRESENT = "face", "present"


@dataclass(frozen=True)
class Verdict:
    """What a judge sees in a batch of images.

    Attributes:
        logits: for each attribute, float with shape (N, K).
        face: whether the image shows a face, bool with shape (N,); logits mean nothing where it does not.
        boxes: face regions in pixels (left, top, right, bottom), float with shape (N, 4).
        landmarks: eyes, nose and corners of the mouth in pixels, with shape (N, 5, 2); None if nobody looked for them.
    """

    logits: dict[str, Tensor]
    face: Tensor
    boxes: Tensor
    landmarks: Tensor | None = None

    def probabilities(self, attribute: str) -> Tensor:
        """p, the class probabilities of one attribute, with shape (N, K)."""
        return self.logits[attribute].softmax(-1)

    def classes(self, attribute: str) -> Tensor:
        """The most probable class, int64 with shape (N,), of one attribute or of a product, as in `Judge.classes`."""
        index = torch.zeros_like(self.face, dtype=torch.long)
        for name in attributes_of(attribute):
            index = index * self.logits[name].shape[-1] + self.logits[name].argmax(-1)
        return index


class AttributeClassifier(nn.Module, ABC):
    """A frozen classifier with one head for each attribute.

    Attributes:
        heads: class names of each attribute, in the order of the logits; empty until loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads: dict[str, tuple[str, ...]] = {}

    @abstractmethod
    def load(self) -> None:
        """Load the weights, freeze them and fill `heads`; the constructor loads nothing."""

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Classify, differentiably.

        Args:
            images: face crops, with shape (N, 3, h, w), in [0, 1].

        Returns:
            Logits of each head, with shape (N, K).
        """

    def train(self, mode: bool = True) -> "AttributeClassifier":
        """Stay in evaluation mode: the classifier is never trained here."""
        return super().train(False)


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


@final
class Judge(nn.Module):
    """Finds the faces and classifies them: images in, a `Verdict` out.

    Args:
        classifier: reads the attributes from face crops.
        faces: finds the faces.
    """

    def __init__(self, classifier: AttributeClassifier, faces: FaceFinder | None = None) -> None:
        super().__init__()
        self.classifier, self.faces = classifier, faces or WholeFrame()

    @property
    def asks_itself(self) -> bool:
        """Whether one network finds the faces and classifies them, and so needs to run only once."""
        both_from_folders = isinstance(self.faces, FacePresence) and isinstance(self.classifier, ImageClassifier)
        return both_from_folders and self.faces.classifier.path == self.classifier.path

    def load(self) -> None:
        """Load both parts."""
        self.classifier.load()
        if self.asks_itself:
            self.faces.classifier = self.classifier
        self.faces.load()

    def reads(self, attribute: str) -> bool:
        """Whether the classifier has a head for an attribute, or for each one of a product."""
        return all(name in self.classifier.heads for name in attributes_of(attribute))

    def classes(self, attribute: str) -> tuple[str, ...]:
        """Class names of one attribute, or of a product: "woman, dark" for gender×race.

        Raises:
            ValueError: if the classifier does not read it.
        """
        for name in attributes_of(attribute):
            if name not in self.classifier.heads:
                raise ValueError(
                    f"the classifier does not read {name!r}, only {', '.join(self.classifier.heads)}: "
                    "choose one of these, or a classifier with that head"
                )
        heads = [self.classifier.heads[name] for name in attributes_of(attribute)]
        return tuple(", ".join(names) for names in product(*heads))

    def every(self, images: Tensor) -> Verdict:
        """Judge all faces of images with shape (N, 3, H, W), in [0, 1], one row for each and for each image without."""
        faces, _ = self.faces.every(images)
        return Verdict(self.classifier(faces.crops), faces.mask, faces.boxes, faces.landmarks)

    def forward(self, images: Tensor) -> Verdict:
        """Judge images with shape (N, 3, H, W), in [0, 1]; differentiable in the logits."""
        return self.begin(images)()

    def begin(self, images: Tensor) -> Callable[[], Verdict]:
        """Begin to find the faces, as `FaceFinder.begin` does; the function returned waits for them and classifies."""
        if self.asks_itself:
            return partial(self.look_once, images)
        find = self.faces.begin(images)

        def verdict() -> Verdict:
            faces = find()
            return Verdict(self.classifier(faces.crops), faces.mask, faces.boxes, faces.landmarks)

        return verdict

    def look_once(self, images: Tensor) -> Verdict:
        """Judge images by the one network that finds the faces and classifies them."""
        logits = self.classifier(images)
        return Verdict(logits, self.faces.present(logits), whole_frame_boxes(images))
