"""Face realism: embeddings of aligned faces, and the bank of real faces they are compared with (paper, section 4.3)."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import override

from fairness_dft.faces.crops import ALIGNED_SIZE, aligned_faces
from fairness_dft.files import Location
from fairness_dft.networks.frozen import FrozenNetwork
from fairness_dft.networks.onnx import OnnxNetwork

NETWORK = "face_network_sha256"  # in a bank's metadata


class FaceEmbedding(FrozenNetwork):
    """ArcFace (Deng et al., 2019, https://arxiv.org/abs/1801.07698): whom an aligned face resembles.

    Args:
        path: ONNX file of a recognition network in insightface's layout, such as that of its packages: a local file, or
            owner/repository/file on the Hugging Face hub. The weights that insightface offers are for non-commercial
            research only.

    Example:
        >>> embedding = FaceEmbedding("arcface.onnx")  # loads nothing
        >>> embedding.check()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: the face network 'arcface.onnx' could not be loaded (there is no file of this name): give ...
    """

    what = "face network"
    allowed = (
        "a local ONNX file, or owner/repository/file on the Hugging Face hub (insightface downloads its own, for "
        "non-commercial research only, with the detector buffalo_l of fairness_dft.faces.InsightFace)"
    )
    way_out = "leave face realism off (--model.face_realism null)"
    single_file = True

    def __init__(self, path: str = "~/.insightface/models/buffalo_l/w600k_r50.onnx") -> None:
        super().__init__()
        self.path = path

    @override
    def _load(self, location: Location) -> None:
        file = location.file()
        network = OnnxNetwork(file)
        *_, channels, height, width = (0, 0, 0, *network.input_shape)
        if channels != 3 or height != width:
            raise ValueError(f"it must read square color images, but its input is {list(network.input_shape)}")
        self.size = height or ALIGNED_SIZE
        # As insightface decides: a network that begins with a normalization expects values in [0, 255].
        subtracts = any(name.startswith(("Sub", "_minus")) for name in network.first_names)
        multiplies = any(name.startswith(("Mul", "_mul")) for name in network.first_names)
        self.scale, self.shift = (255.0, 0.0) if subtracts and multiplies else (2.0, -1.0)
        self.width = embedding_width(network, self.size)
        self.network, self.digest = network, sha256(file)

    def align(self, images: Tensor, landmarks: Tensor) -> Tensor:
        """Return the aligned faces that it reads, with shape (N, 3, size, size); see `crops.aligned_faces`."""
        return aligned_faces(images, landmarks, self.size)

    def forward(self, faces: Tensor) -> Tensor:
        """Embed aligned faces with shape (N, 3, size, size), in [0, 1]: unit length, with shape (N, D)."""
        return normalize(self.network(faces * self.scale + self.shift).to(faces.dtype), dim=-1)


def embedding_width(network: nn.Module, size: int) -> int:
    """Return the dimension of a network's embeddings.

    Args:
        network: Reads color images.
        size: Their side in pixels.

    Raises:
        ValueError: If it gives anything but one embedding for each image.
    """
    with torch.no_grad():
        embeddings = network(torch.zeros(2, 3, size, size))
    if embeddings.ndim != 2 or len(embeddings) != 2:
        raise ValueError(f"it must give one embedding per face, but gives shape {list(embeddings.shape)} for two")
    return int(embeddings.shape[1])


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


class FaceRealism(FrozenNetwork):
    """What generated faces are compared with: an embedding, and a bank of real faces.

    `check` looks for the bank alone: insightface downloads the network of the embedding together with the detector.

    Args:
        bank: Safetensors file written by `python -m fairness_dft.face_bank`, local or as owner/repository/file on the
            Hugging Face hub.
        embedding: Embedding of faces, the same with which the bank was made.
        weight: λ_face, the weight of the loss (paper: 1 for gender, 0.1 for others).
        confidence: The least probability that the classifier must give the class of the original face for this face to
            be the reference, in [0, 1].

    Example:
        >>> realism = FaceRealism("face_bank.safetensors", weight=0.1)  # loads nothing
        >>> realism.check()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: the face bank 'face_bank.safetensors' could not be loaded (there is no file of this name): give ...
    """

    what = "face bank"
    allowed = "a bank of real faces, made with `python -m fairness_dft.face_bank`"
    way_out = "leave face realism off (--model.face_realism null)"
    single_file = True

    def __init__(
        self, bank: str, embedding: FaceEmbedding | None = None, weight: float = 1.0, confidence: float = 0.8
    ) -> None:
        super().__init__()
        if not 0 <= confidence <= 1:
            raise ValueError(f"`confidence` must be at least 0 and at most 1, but got {confidence}")
        if not weight >= 0:
            raise ValueError(f"`weight` must not be negative, but got {weight}")
        self.path, self.weight, self.confidence = bank, weight, confidence
        self.embedding = embedding or FaceEmbedding()

    @override
    def load(self) -> None:
        """Load the network and the bank; a second call does nothing.

        Raises:
            ValueError: If one of them cannot be loaded, or the bank is empty or was made with another network.
        """
        self.check()
        self.embedding.load()
        super().load()

    @override
    def _load(self, location: Location) -> None:
        bank, made_with = read_bank(location.file())
        expected = self.embedding.width
        if bank.ndim != 2 or not len(bank) or bank.shape[1] != expected or made_with != self.embedding.digest:
            raise ValueError(
                f"it has shape {list(bank.shape)} and was not made with the face network {self.embedding.path!r}"
            )
        # A parameter, since DDP broadcasts buffers in every step.
        self.bank = nn.Parameter(normalize(bank, dim=1), requires_grad=False)


def read_bank(file: Path) -> tuple[Tensor, str]:
    """Return the embeddings of a face bank, and the SHA-256 of the network that made them.

    Raises:
        ValueError: If the file is not a face bank.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            return opened.get_tensor("embeddings").float(), metadata.get(NETWORK, "")
    except SafetensorError as error:
        raise ValueError("it is not a face bank") from error
