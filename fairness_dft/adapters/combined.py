"""Several adapters trained together, each with its own settings and learning rate."""

from collections.abc import Sequence

from torch import nn
from typing_extensions import override

from fairness_dft.adapters.base import Adapter, Name
from fairness_dft.adapters.lora import TextEncoderLoRA, UNetLoRA
from fairness_dft.diffusion.text_to_image import TextToImage


class Combined(Adapter):
    """Several adapters, trained together.

    Args:
        parts: The adapters, of different kinds; by default LoRA in the text encoder and the U-Net.

    Raises:
        ValueError: If there is none, or two of a kind.
    """

    def __init__(self, parts: Sequence[Adapter] | None = None) -> None:
        self._parts = [TextEncoderLoRA(), UNetLoRA()] if parts is None else list(parts)
        kinds = [type(part).__name__ for part in self._parts]
        if not kinds or len(set(kinds)) < len(kinds) or any(isinstance(part, Combined) for part in self._parts):
            got = ", ".join(kinds) or "none"
            raise ValueError(f"`parts` must be adapters of different kinds, but got {got}")

    @property
    @override
    def parts(self) -> Sequence[Adapter]:
        return self._parts

    @property
    @override
    def scalable(self) -> bool:
        return all(part.scalable for part in self.parts)

    @override
    def attach(self, model: TextToImage) -> None:
        for part in self.parts:
            part.attach(model)
        # PEFT freezes what it does not know, such as a part before it.
        self.switch("trained")

    @override
    def tensors(self, name: Name) -> dict[str, nn.Parameter]:
        return {key: tensor for part in self.parts for key, tensor in part.tensors(name).items()}

    @override
    def rescale(self, scale: float, name: Name = "ema") -> None:
        for part in self.parts:
            part.rescale(scale, name)

    @override
    def _activate(self, name: Name) -> None:
        for part in self.parts:
            part.switch(name)
