"""What the image shows besides the attribute: frozen CLIP, DINO and face embeddings, differentiable in the image.

All embeddings have unit length, so that a dot product is the cosine similarity.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fairness_dft.faces import ALIGNED_SIZE, aligned_faces
from fairness_dft.loading import file_or_hub, on_hub, one_line, quiet, resolve
from fairness_dft.onnx_network import OnnxNetwork
from fairness_dft.preprocessing import Preprocessing

NETWORK = "face_network_sha256"  # in a bank's metadata


class FeatureNet(nn.Module, ABC):
    """A frozen image embedding.

    Args:
        path: folder or hub id of the network, with its preprocessor_config.json.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def load(self) -> None:
        """Load the weights and freeze them.

        Raises:
            ValueError: if the network cannot be loaded.
        """
        from transformers.utils import cached_file

        if hasattr(self, "network"):
            return
        folder = resolve(self.path)
        source = str(folder) if folder.is_dir() else self.path
        local = folder.is_dir() or not on_hub(self.path)
        try:
            with quiet():
                file = cached_file(source, "preprocessor_config.json", local_files_only=local)
                network = self._load(source, local_files_only=local)
        except Exception as error:  # each library and file format raises its own
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise ValueError(
                f"the feature network {self.path!r} could not be loaded ({reason}): download it where there "
                f"is a network (`hf download {self.path}`), give a local folder, or run on the miniature with "
                "--config experiments/parts/portraits.yaml"
            ) from error
        self.preprocessing = Preprocessing.from_file(file)
        self.network = network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FeatureNet":
        """Stay in evaluation mode: feature networks are never trained here."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: with shape (N, 3, H, W), in [0, 1].

        Returns:
            Unit-length embeddings, with shape (N, D).
        """
        # Half a per cent of a cosine is much: whatever the precision of the network, that of the images is kept.
        return normalize(self._embed(self.preprocessing(images)).to(images.dtype), dim=-1)

    @abstractmethod
    def _load(self, source: str, local_files_only: bool) -> nn.Module:
        """The network, from a folder or hub id, or from what is cached of a hub id."""

    @abstractmethod
    def _embed(self, pixels: Tensor) -> Tensor:
        """Embeddings of prepared pixels, not yet of unit length, with shape (N, D)."""


class Clip(FeatureNet):
    """CLIP (Radford et al., 2021, https://arxiv.org/abs/2103.00020): images and texts in one space."""

    def _load(self, source: str, local_files_only: bool) -> nn.Module:
        from transformers import CLIPModel, CLIPTokenizer

        self.tokenizer = CLIPTokenizer.from_pretrained(source, local_files_only=local_files_only)
        # Where transformers finds no vocabulary, it makes one of special tokens alone.
        if len(self.tokenizer) <= 3:
            raise OSError(f"{source} holds no vocabulary for its tokenizer")
        return CLIPModel.from_pretrained(source, dtype=torch.float32, local_files_only=local_files_only)

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.network.visual_projection(self.network.vision_model(pixels).pooler_output)

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-length embeddings of texts, with shape (N, D)."""
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids.to(self.network.device)
        embeddings = self.network.text_projection(self.network.text_model(tokens).pooler_output)
        return normalize(embeddings.to(self.network.dtype), dim=-1)


class Dino(FeatureNet):
    """DINOv2 (Oquab et al., 2023, https://arxiv.org/abs/2304.07193): class token of a self-supervised ViT."""

    def _load(self, source: str, local_files_only: bool) -> nn.Module:
        from transformers import AutoModel

        return AutoModel.from_pretrained(source, dtype=torch.float32, local_files_only=local_files_only)

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.network(pixels).last_hidden_state[:, 0]


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
                "buffalo_l (fairness_dft.detectors.InsightFace; for non-commercial research only); else give another "
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
