"""A soft prompt prefix: what is trained are n token embeddings before those of the prompt, v_1 … v_n P.

The empty prompt ∅ of classifier-free guidance is left as it is.

References:
    The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al., 2021). https://arxiv.org/abs/2104.08691
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from fairness_dft.adapters.base import Adapter, Name, checked_rate
from fairness_dft.diffusion.text_to_image import TextToImage


class PromptPrefix(Adapter):
    """Soft tokens before every prompt but the empty one; exported as a textual inversion.

    Where the prompt fills the text encoder's length, its end is cut off to make room.

    Args:
        length: The number n of tokens.
        token: The word that stands for them, in a prompt of another program.
        learning_rate: The learning rate of this part; that of the run by default.

    Raises:
        ValueError: If the length is not positive, the token has another form or the learning rate is negative.
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
        tokenizer, text_encoder = getattr(model, "tokenizer", None), getattr(model, "text_encoder", None)
        if tokenizer is None or text_encoder is None:
            raise ValueError("the text-to-image model has no tokenizer and text encoder: choose another adapter")
        most = (min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings) - 2) // 2
        if self.length > most:
            raise ValueError(f"`length` must be at most {most}, half of what the text encoder reads, got {self.length}")
        words = [self.token, *(f"{self.token}_{i}" for i in range(1, self.length))]  # as diffusers names them
        if known := set(words) & tokenizer.get_vocab().keys():
            raise ValueError(f"`token` must be a new word, but the tokenizer knows {', '.join(sorted(known))}")
        # In a vocabulary's own order, every process would draw other words.
        whole = [index for word, index in sorted(tokenizer.get_vocab().items()) if re.fullmatch(r"[a-z]+</w>", word)]
        drawn = [whole[i] for i in torch.randint(len(whole), (self.length,)).tolist()]
        first = len(tokenizer)
        tokenizer.add_tokens(words)
        self._model, self._words = model, " ".join(words) + " "
        self._embedding = PrefixEmbedding(text_encoder.get_input_embeddings(), first, drawn)
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
    """The token embedding of a text encoder, with further rows for soft tokens.

    Args:
        words: The frozen embedding of the words.
        first: The index of the first soft token.
        drawn: The words at whose embeddings the soft tokens start.
    """

    def __init__(self, words: nn.Embedding, first: int, drawn: Sequence[int]) -> None:
        super().__init__()
        self.words, self.first, self.active = words, first, "trained"
        start = words.weight[list(drawn)].detach().float()
        self.prefixes = nn.ParameterDict({name: nn.Parameter(start.clone()) for name in ("trained", "ema")})

    @property
    def weight(self) -> Tensor:
        """The embeddings of the words, with shape (V, D)."""
        return self.words.weight

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Embeds token indices with shape (B, L), as float with shape (B, L, D)."""
        embeddings, soft = self.words(tokens.clamp(max=self.first - 1)), tokens >= self.first
        if self.active == "original" or not soft.any():
            return embeddings
        prefix = self.prefixes[self.active].to(embeddings.dtype)
        return torch.where(soft[..., None], prefix[(tokens - self.first).clamp(min=0)], embeddings)
