"""The interface of an adapter: original, trained and EMA weights on one copy of the base model."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.files import replacing

Name = Literal["original", "trained", "ema"]


class Adapter(ABC):
    """A set of trained tensors inside a frozen model, and their moving average.

    A subclass defines how the tensors are injected (`attach`), what they are (`tensors`), how the model uses them
    (`_activate`) and the name of the exported file (`file`).

    Attributes:
        active: The name of the model in use.
        file: The name of the exported file; in a combination, each part has its own.
        learning_rate: The learning rate of this adapter; None for that of the run.
    """

    active: Name = "trained"
    file: str
    learning_rate: float | None = None

    @abstractmethod
    def attach(self, model: TextToImage) -> None:
        """Inject the adapters `trained` and `ema`, equal at first, into a loaded model and make `trained` active.

        Args:
            model: Frozen text-to-image model, which is changed in place.

        Raises:
            ValueError: If the adapter does not fit the model, or is already attached.
        """

    @abstractmethod
    def tensors(self, name: Name) -> dict[str, nn.Parameter]:
        """Return the live tensors of `trained` or `ema`, by their names in an exported file."""

    @abstractmethod
    def _activate(self, name: Name) -> None:
        """Make the model compute with the named tensors, or with none for `original`."""

    @property
    def scalable(self) -> bool:
        """Whether the adapter can be applied more or less strongly."""
        return False

    @property
    def parts(self) -> Sequence["Adapter"]:
        """The adapters that this one consists of: by default itself alone."""
        return [self]

    def settings(self, name: Name) -> dict[str, Any]:
        """Return what other programs must know in addition to the tensors of `trained` or `ema`."""
        return {}

    def save(self, folder: str | Path, name: Name = "ema") -> list[Path]:
        """Export `trained` or `ema` as safetensors, in the layout that diffusers loads.

        Args:
            folder: Folder of the files; it is created if needed.
            name: Tensors to export.

        Returns:
            The paths of the files.
        """
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
        from safetensors.torch import save_file

        paths = self._paths(folder)
        for path in paths:
            parts = [part for part in self.parts if part.file == path.name]
            state = {key: tensor for part in parts for key, tensor in part.state_dict(name).items()}
            settings = {key: value for part in parts for key, value in part.settings(name).items()}
            extra = {LORA_ADAPTER_METADATA_KEY: json.dumps(settings)} if settings else {}
            with replacing(path) as draft:
                save_file(state, draft, metadata={"format": "pt", **extra})
        return paths

    def load(self, folder: str | Path, name: Name = "ema") -> None:
        """Copy what `save` wrote into `trained` or `ema`.

        Args:
            folder: Folder of the files.
            name: Tensors to overwrite.

        Raises:
            ValueError: If a file is missing or belongs to another adapter.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        state: dict[str, Tensor] = {}
        for path in self._paths(folder):
            try:
                state |= load_file(path)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{str(path)!r} could not be read: {error}") from error
        self.load_state_dict(state, name)

    def _paths(self, folder: str | Path) -> list[Path]:
        """Return the exported files, one for all parts that share it."""
        return [Path(folder, file) for file in dict.fromkeys(part.file for part in self.parts)]

    def rescale(self, scale: float, name: Name = "ema") -> None:
        """Change permanently how strongly `trained` or `ema` is applied.

        Args:
            scale: Factor; 0 leaves the base model.
            name: Tensors to scale.

        Raises:
            ValueError: If the adapter is not `scalable`, and `scale` is not 1.
        """
        if scale != 1:
            raise ValueError(f"{type(self).__name__} has no strength to change: leave the scale at 1")

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the trained tensors with their learning rates, for an optimizer.

        Args:
            learning_rate: Learning rate of each part that has none of its own.
        """
        rates = [learning_rate if part.learning_rate is None else part.learning_rate for part in self.parts]
        return [{"params": part.parameters(), "lr": rate} for part, rate in zip(self.parts, rates, strict=True)]

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained tensors θ."""
        return list(self.tensors("trained").values())

    @contextmanager
    def using(self, name: Name) -> Iterator[None]:
        """Make the named model active inside a `with` block, and the previous one again after it.

        A graph that is built inside the block must also be back-propagated inside it, because the backward pass
        computes checkpointed steps again.

        Args:
            name: Model to use: `original`, `trained` or `ema`.
        """
        previous = self.active
        self.switch(name)
        try:
            yield
        finally:
            self.switch(previous)

    def switch(self, name: Name) -> None:
        """Make the named model active until further notice.

        Args:
            name: Model to use: `original`, `trained` or `ema`.

        Raises:
            ValueError: If there is no such model.
        """
        if name not in ("original", "trained", "ema"):
            raise ValueError(f"`name` must be original, trained or ema, but got {name!r}")
        self._activate(name)
        self.active = name
        # PEFT makes whatever is active trainable, and freezes the rest.
        for trained, average in zip(self.parameters(), self.tensors("ema").values(), strict=True):
            trained.requires_grad_(True)
            average.requires_grad_(False)

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Move the average: θ_ema ← decay θ_ema + (1 - decay) θ.

        Args:
            decay: Weight of the previous average, in [0, 1].
        """
        averages: list[Tensor] = list(self.tensors("ema").values())
        trained: list[Tensor] = list(self.parameters())
        torch._foreach_lerp_(averages, trained, 1 - decay)

    def state_dict(self, name: Name) -> dict[str, Tensor]:
        """Return a copy of the tensors of `trained` or `ema`, on the CPU."""
        return {key: tensor.detach().cpu().clone() for key, tensor in self.tensors(name).items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], name: Name) -> None:
        """Copy tensors into `trained` or `ema`.

        Args:
            state: Result of `state_dict`, or the content of an exported file.
            name: Tensors to overwrite.

        Raises:
            ValueError: If the names or shapes are not those of this adapter.
        """
        tensors = self.tensors(name)
        if different := sorted(state.keys() ^ tensors.keys()):
            count = f"{len(different)} tensors do not match, such as {different[0]}"
            raise ValueError(f"the state belongs to another adapter: {count}")
        for key, tensor in tensors.items():
            if state[key].shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)}, but got {tuple(state[key].shape)}"
                raise ValueError(f"the state belongs to another adapter: {key} must have the shape {shapes}")
        for key, tensor in tensors.items():
            tensor.copy_(state[key])


def checked_rate(learning_rate: float | None) -> float | None:
    """Return the learning rate of an adapter.

    Raises:
        ValueError: If it is negative.
    """
    if learning_rate is not None and learning_rate < 0:
        raise ValueError(f"`learning_rate` must not be negative, but got {learning_rate}")
    return learning_rate


def parts_of(model: TextToImage, *names: str) -> list[Any]:
    """Return the parts of a model that an adapter needs, such as its `tokenizer` and `text_encoder`.

    Raises:
        ValueError: If the model has no such part.
    """
    if missing := [name for name in names if not hasattr(model, name)]:
        raise ValueError(f"the text-to-image model has no {' and no '.join(missing)}: choose another adapter")
    return [getattr(model, name) for name in names]
