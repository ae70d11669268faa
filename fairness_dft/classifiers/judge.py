"""h, the frozen attribute classifiers: face crops in, for each attribute a distribution p = softmax(h(x)) out.

A classifier is a folder in Hugging Face's image-classification layout. Several attributes share one network
as heads: the label "gender/woman" is the class *woman* of the head *gender*. Unless all labels name a head, there
is a single head, named by `attribute`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import final

from fairness_dft.attributes import attributes_of
from fairness_dft.classifiers.base import AttributeClassifier
from fairness_dft.classifiers.image_classifier import FacePresence, ImageClassifier
from fairness_dft.faces.finders import FaceFinder, WholeFrame, whole_frame_boxes


@dataclass(frozen=True)
class Verdict:
    """What the classifier says of a batch of images.

    Attributes:
        logits: Logits of each attribute, float with shape (N, K).
        has_face: Whether the image shows a face, bool with shape (N,); logits mean nothing where it shows no face.
        boxes: Face regions in pixels (left, top, right, bottom), float with shape (N, 4).
        landmarks: Eyes, nose and corners of the mouth in pixels, with shape (N, 5, 2); None if the finder has none.
        owners: Index of the image of each row, int64 with shape (N,); None for one row per image.
    """

    logits: dict[str, Tensor]
    has_face: Tensor
    boxes: Tensor
    landmarks: Tensor | None = None
    owners: Tensor | None = None

    def probabilities(self, attribute: str) -> Tensor:
        """Return p, the class probabilities of one attribute, with shape (N, K)."""
        return self.logits[attribute].softmax(-1)

    def classes(self, attribute: str) -> Tensor:
        """Return the most probable class of an attribute or of a product, as in `Judge.classes`: int64, shape (N,)."""
        index = torch.zeros_like(self.has_face, dtype=torch.long)
        for name in attributes_of(attribute):
            index = index * self.logits[name].shape[-1] + self.logits[name].argmax(-1)
        return index


@final
class Judge(nn.Module):
    """Find faces and classify them: images in, a `Verdict` out.

    Args:
        classifier: Reads the attributes from face crops.
        faces: Finds the faces.

    Example:
        >>> from fairness_dft.classifiers import FacePresence, ImageClassifier
        >>> folder = "data/portraits/classifier_evaluation"
        >>> judge = Judge(ImageClassifier(folder), FacePresence(folder))
        >>> judge.load()
        >>> judge.classes("gender")
        ('man', 'woman')
        >>> verdict = judge(torch.zeros(2, 3, 64, 64))
        >>> verdict.probabilities("gender").shape, verdict.has_face.shape
        (torch.Size([2, 2]), torch.Size([2]))
    """

    def __init__(self, classifier: AttributeClassifier, faces: FaceFinder | None = None) -> None:
        super().__init__()
        self.classifier, self.faces = classifier, faces or WholeFrame()

    @property
    def asks_itself(self) -> bool:
        """Whether one network finds the faces and classifies them, so that it needs to run only once."""
        if not (isinstance(self.faces, FacePresence) and isinstance(self.classifier, ImageClassifier)):
            return False
        return self.faces.classifier.path == self.classifier.path

    def check(self) -> None:
        """Refuse parts that cannot be found; load nothing and change no state.

        Raises:
            ValueError: If a part cannot be found.
        """
        self.classifier.check()
        self.faces.check()

    def load(self) -> None:
        """Load both parts."""
        self.classifier.load()
        if self.asks_itself:
            self.faces.classifier = self.classifier
        self.faces.load()

    def reads(self, attribute: str) -> bool:
        """Return whether the classifier has a head for an attribute, or for each factor of a product."""
        return all(name in self.classifier.heads for name in attributes_of(attribute))

    def classes(self, attribute: str) -> tuple[str, ...]:
        """Return the class names of one attribute, or of a product: "woman, dark" for gender×race.

        Raises:
            ValueError: If the classifier does not read it.
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
        """Classify all faces of images with shape (N, 3, H, W), in [0, 1]; an image that shows no face has one row."""
        faces, owners = self.faces.every(images)
        return Verdict(self.classifier(faces.crops), faces.has_face, faces.boxes, faces.landmarks, owners)

    def forward(self, images: Tensor) -> Verdict:
        """Classify images with shape (N, 3, H, W), in [0, 1]; the logits are differentiable in the images."""
        return self.submit(images)()

    def submit(self, images: Tensor) -> Callable[[], Verdict]:
        """Start to find faces, as `FaceFinder.submit` does; the function returned waits for them and classifies."""
        if self.asks_itself:
            return partial(self.look_once, images)
        find = self.faces.submit(images)

        def verdict() -> Verdict:
            faces = find()
            return Verdict(self.classifier(faces.crops), faces.has_face, faces.boxes, faces.landmarks)

        return verdict

    def look_once(self, images: Tensor) -> Verdict:
        """Classify images by the one network that both finds the faces and classifies them."""
        logits = self.classifier(images)
        return Verdict(logits, cast(FacePresence, self.faces).present(logits), whole_frame_boxes(images))
