"""Face realism: embeddings of aligned faces, and the bank of real faces they are compared with (paper, section 4.3)."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fairness_dft.faces.crops import ALIGNED_SIZE, aligned_faces
from fairness_dft.files import file_or_hub, one_line
from fairness_dft.networks.onnx import OnnxNetwork

NETWORK = "face_network_sha256"  # in a bank's metadata


class FaceEmbedding(nn.Module):
    """ArcFace (Deng et al., 2019, https://arxiv.org/abs/1801.07698): whom an aligned face resembles.

    Args:
        path: ONNX file of a recognition network in insightface's layout, such as that of its packages: a local file, or
            owner/repository/file on the Hugging Face hub. The weights that insightface offers are for non-commercial
            research only.
    """

    def __init__(self, path: str = "~/.insightface/models/buffalo_l/w600k_r50.onnx") -> None:
        super().__init__()
        self.path = path

    def load(self) -> None:
        """Load the weights.

        Raises:
            ValueError: if the file is not there, or no network of square color images that is known here.
        """
        if hasattr(self, "network"):
            return
        try:
            file = file_or_hub(self.path)
        except ValueError as error:
            raise ValueError(
                f"the face network {self.path!r} is not there: insightface downloads its own with the detector "
                "buffalo_l (fairness_dft.faces.InsightFace; for non-commercial research only); else give another "
                "ONNX file, or leave face realism off (--model.face_realism null)"
            ) from error
        network = OnnxNetwork(file)
        *_, channels, height, width = (0, 0, 0, *network.input_shape)
        if channels != 3 or height != width:
            shape = list(network.input_shape)
            raise ValueError(f"the face network {self.path!r} must read square color images, but its input is {shape}")
        self.size = height or ALIGNED_SIZE
        # As insightface tells: a network that begins by normalising wants values in [0, 255].
        subtracts = any(name.startswith(("Sub", "_minus")) for name in network.first_names)
        multiplies = any(name.startswith(("Mul", "_mul")) for name in network.first_names)
        self.scale, self.shift = (255.0, 0.0) if subtracts and multiplies else (2.0, -1.0)
        try:
            with torch.no_grad():
                embeddings = network(torch.zeros(2, 3, self.size, self.size))
        except Exception as error:  # whatever the operators make of shapes that do not fit
            raise ValueError(f"the face network {self.path!r} cannot be run: {one_line(error)}") from error
        if embeddings.ndim != 2 or len(embeddings) != 2:
            shape = list(embeddings.shape)
            raise ValueError(f"the face network {self.path!r} must give one embedding a face, but of two got {shape}")
        self.network, self.width = network, embeddings.shape[1]
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()

    def align(self, images: Tensor, landmarks: Tensor) -> Tensor:
        """The aligned faces that it reads, with shape (N, 3, size, size); see `faces.aligned_faces`."""
        return aligned_faces(images, landmarks, self.size)

    def forward(self, faces: Tensor) -> Tensor:
        """Embed aligned faces with shape (N, 3, size, size), in [0, 1]: unit length, with shape (N, D)."""
        return normalize(self.network(faces * self.scale + self.shift).to(faces.dtype), dim=-1)


class FaceRealism(nn.Module):
    """What generated faces are compared with: an embedding, and a bank of real faces.

    Args:
        bank: safetensors file of `python -m fairness_dft.face_bank`.
        embedding: of faces; the one that the bank was made with.
        weight: λ_face, the weight of the loss (paper: 1 for gender, 0.1 for others).
        confidence: how sure the classifier must be of the original's class for its face to be the reference, in [0, 1].
    """

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

    def check(self) -> Path:
        """Find the bank.

        Raises:
            ValueError: if it is not there.
        """
        try:
            return file_or_hub(self.path)
        except ValueError as error:
            raise ValueError(
                f"the face bank {self.path!r} is not there: make one of real faces with "
                "`python -m fairness_dft.face_bank`, or leave face realism off (--model.face_realism null)"
            ) from error

    def load(self) -> None:
        """Load the network and the bank.

        Raises:
            ValueError: if one of them is not there, or the bank is empty or another network's.
        """
        from safetensors import SafetensorError, safe_open

        if hasattr(self, "bank"):
            return
        file = self.check()
        self.embedding.load()
        try:
            with safe_open(file, "pt") as opened:
                bank, metadata = opened.get_tensor("embeddings").float(), opened.metadata() or {}
        except SafetensorError as error:
            raise ValueError(
                f"the face bank {self.path!r} is none: make one with `python -m fairness_dft.face_bank`"
            ) from error
        width = self.embedding.width
        if bank.ndim != 2 or not len(bank) or bank.shape[1] != width or metadata.get(NETWORK) != self.embedding.digest:
            raise ValueError(
                f"the face bank {self.path!r}, of shape {list(bank.shape)}, was not made with the face network "
                f"{self.embedding.path!r}: make it anew with `python -m fairness_dft.face_bank`"
            )
        # A parameter, which unlike a buffer DDP does not send round in every step.
        self.bank = nn.Parameter(normalize(bank, dim=1), requires_grad=False)
