"""What an image shows apart from the attribute: frozen CLIP and DINO embeddings, differentiable in the image.

All embeddings have unit length, so that a dot product is the cosine similarity.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import override

from fairness_dft.files import Location, quiet
from fairness_dft.networks.frozen import FrozenNetwork
from fairness_dft.networks.preprocessing import Preprocessing


class FeatureNet(FrozenNetwork, ABC):
    """A frozen image embedding.

    Args:
        path: Folder or hub id of the network, with its preprocessor_config.json.
    """

    what = "feature network"
    required_files = ("config.json", "preprocessor_config.json")
    network: Any
    preprocessing: Preprocessing

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: Images with shape (N, 3, H, W), in [0, 1].

        Returns:
            Unit-length embeddings, with shape (N, D).
        """
        # An error of half a percent in a cosine matters: the result has the precision of the images, not the network's.
        return normalize(self._embed(self.preprocessing(images)).to(images.dtype), dim=-1)

    @abstractmethod
    def _embed(self, pixels: Tensor) -> Tensor:
        """Return embeddings of preprocessed pixels, before normalization, with shape (N, D)."""


class Clip(FeatureNet):
    """CLIP (Radford et al., 2021, https://arxiv.org/abs/2103.00020): images and texts in one space.

    Args:
        path: Folder or hub id of the network, with its preprocessor_config.json.

    Example:
        >>> clip = Clip("data/portraits/clip")
        >>> clip.load()
        >>> clip(torch.zeros(2, 3, 64, 64)).shape == clip.embed_text(["a chef", "a pilot"]).shape
        True
    """

    tokenizer: Any

    @override
    def _load(self, location: Location) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        with quiet():
            tokenizer = CLIPTokenizer.from_pretrained(location.source, **location.options)
            # Where transformers finds no vocabulary, it makes one of special tokens alone.
            if len(tokenizer) <= 3:
                raise OSError(f"{location.source} holds no vocabulary for its tokenizer")
            preprocessing = Preprocessing.from_file(location.file("preprocessor_config.json"))
            self.network = CLIPModel.from_pretrained(location.source, dtype=torch.float32, **location.options)
        self.tokenizer, self.preprocessing = tokenizer, preprocessing

    @override
    def _embed(self, pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.network.visual_projection(self.network.vision_model(pixels).pooler_output)
        return embeddings

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Return unit-length embeddings of texts, with shape (N, D)."""
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids.to(self.network.device)
        embeddings = self.network.text_projection(self.network.text_model(tokens).pooler_output)
        return normalize(embeddings.to(self.network.dtype), dim=-1)


class Dino(FeatureNet):
    """DINOv2 (Oquab et al., 2023, https://arxiv.org/abs/2304.07193): the class token of a self-supervised ViT.

    Args:
        path: Folder or hub id of the network, with its preprocessor_config.json.

    Example:
        >>> dino = Dino("data/portraits/dino")
        >>> dino.load()
        >>> embeddings = dino(torch.zeros(2, 3, 64, 64))
        >>> torch.allclose(embeddings.norm(dim=1), torch.ones(2))
        True
    """

    @override
    def _load(self, location: Location) -> None:
        from transformers import AutoModel

        with quiet():
            preprocessing = Preprocessing.from_file(location.file("preprocessor_config.json"))
            self.network = AutoModel.from_pretrained(location.source, dtype=torch.float32, **location.options)
        self.preprocessing = preprocessing

    @override
    def _embed(self, pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.network(pixels).last_hidden_state[:, 0]
        return embeddings
