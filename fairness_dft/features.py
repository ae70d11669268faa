"""What the image shows besides the attribute: frozen CLIP, DINO and face embeddings, differentiable in the image.

All embeddings have unit length, so that a dot product is the cosine similarity.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fairness_dft.files import on_hub, quiet, resolve
from fairness_dft.networks.preprocessing import Preprocessing


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
