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
        parts: Adapters of different classes; by default LoRA in the text encoder and the U-Net.

    Raises:
        ValueError: If there is no adapter, or two have the same class.

    Example:
        >>> from fairness_dft.diffusion import StableDiffusion
        >>> model = StableDiffusion("data/portraits/pipeline")
        >>> model.load()
        >>> adapter = Combined([TextEncoderLoRA(rank=4), UNetLoRA(rank=4, learning_rate=1e-5)])
        >>> adapter.attach(model)
        >>> [group["lr"] for group in adapter.parameter_groups(learning_rate=5e-5)]
        [5e-05, 1e-05]
    """

    def __init__(self, parts: Sequence[Adapter] | None = None) -> None:
        self._parts = [TextEncoderLoRA(), UNetLoRA()] if parts is None else list(parts)
        classes = [type(part).__name__ for part in self._parts]
        if not classes or len(set(classes)) < len(classes) or any(isinstance(part, Combined) for part in self._parts):
            got = ", ".join(classes) or "none"
            raise ValueError(f"`parts` must be adapters of different classes, but got {got}")

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
        # PEFT freezes all tensors that are not its own, such as those of a part before it.
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
