"""A soft prompt prefix: n trained token embeddings before those of the prompt, v_1 … v_n P.

The empty prompt ∅ of classifier-free guidance gets no prefix.

References:
    The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al., 2021). https://arxiv.org/abs/2104.08691
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from fairness_dft.adapters.base import Adapter, Name, checked_rate, parts_of
from fairness_dft.diffusion.diffusers_model import token_limit
from fairness_dft.diffusion.text_to_image import TextToImage


class PromptPrefix(Adapter):
    """Trained tokens before every prompt except the empty one; exported as a textual inversion.

    If a prompt fills the length that the text encoder reads, its end is truncated to make room.

    Args:
        length: Number n of tokens.
        token: Word that stands for the tokens in the prompts of other programs.
        learning_rate: Learning rate of this adapter; by default that of the run.

    Raises:
        ValueError: If the length is not positive, the token is not a word in angle brackets, or the learning rate is
            negative.

    Example:
        >>> from fairness_dft.diffusion import StableDiffusion
        >>> model = StableDiffusion("data/portraits/pipeline")
        >>> model.load()
        >>> adapter = PromptPrefix(length=2)
        >>> adapter.attach(model)
        >>> model.prefix
        '<fair> <fair>_1 '
        >>> with adapter.using("original"):
        ...     model.prefix
        ''
    """

    file = "learned_embeds.safetensors"

    def __init__(self, length: int = 5, token: str = "<fair>", learning_rate: float | None = None) -> None:
        if length < 1:
            raise ValueError(f"`length` must be at least 1, but got {length}")
        if not re.fullmatch(r"<[^<>\s]+>", token):
            raise ValueError(f"`token` must be a word in angle brackets, such as <fair>, but got {token!r}")
        self.length = length
        self.token = token
        self.learning_rate = checked_rate(learning_rate)

    @override
    def attach(self, model: TextToImage) -> None:
        tokenizer, text_encoder = parts_of(model, "tokenizer", "text_encoder")
        most = (token_limit(tokenizer, text_encoder) - 2) // 2
        if self.length > most:
            raise ValueError(
                f"`length` must be at most {most}, half of what the text encoder reads, but got {self.length}"
            )
        words = [self.token, *(f"{self.token}_{i}" for i in range(1, self.length))]  # as diffusers names them
        if known := set(words) & tokenizer.get_vocab().keys():
            raise ValueError(f"`token` must be a new word, but the tokenizer knows {', '.join(sorted(known))}")
        # Sorted, because the order of a vocabulary may differ between processes, which must draw the same words.
        whole = [index for word, index in sorted(tokenizer.get_vocab().items()) if re.fullmatch(r"[a-z]+</w>", word)]
        start = [whole[i] for i in torch.randint(len(whole), (self.length,)).tolist()]
        first = len(tokenizer)
        tokenizer.add_tokens(words)
        self._model, self._words = model, " ".join(words) + " "
        self._embedding = PrefixEmbedding(text_encoder.get_input_embeddings(), first, start)
        text_encoder.set_input_embeddings(self._embedding)
        self.switch("trained")

    @override
    def tensors(self, name: Name) -> dict[str, nn.Parameter]:
        return {self.token: self._embedding.prefixes[name]}

    @override
    def _activate(self, name: Name) -> None:
        self._model.prefix = "" if name == "original" else self._words
        self._embedding.active = name


class PrefixEmbedding(nn.Module):
    """The token embedding of a text encoder, with additional rows for soft tokens.

    Args:
        words: Frozen embedding of the words.
        first: Index of the first soft token.
        start: Indices of the words from whose embeddings the soft tokens start.
    """

    def __init__(self, words: nn.Embedding, first: int, start: Sequence[int]) -> None:
        super().__init__()
        self.words, self.first = words, first
        self.active: Name = "trained"
        rows = words.weight[list(start)].detach().float()
        self.prefixes = nn.ParameterDict({name: nn.Parameter(rows.clone()) for name in ("trained", "ema")})

    @property
    def weight(self) -> Tensor:
        """The embeddings of the words, with shape (V, D)."""
        return self.words.weight

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token indices with shape (B, L), as float with shape (B, L, D)."""
        embeddings: Tensor = self.words(tokens.clamp(max=self.first - 1))
        soft = tokens >= self.first
        if self.active == "original" or not soft.any():
            return embeddings
        prefix = self.prefixes[self.active].to(embeddings.dtype)
        return torch.where(soft[..., None], prefix[(tokens - self.first).clamp(min=0)], embeddings)
