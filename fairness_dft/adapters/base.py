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

Name = Literal["original", "trained", "ema"]


class Adapter(ABC):
    """A set of trained tensors inside a frozen model, and their moving average.

    A kind of adapter says how it is injected (`attach`), which tensors it has (`tensors`), which of them the
    model uses (`_activate`) and the name of the file that other programs load it from (`file`).

    Attributes:
        active: The name of the model in use.
        scalable: Whether it can be applied more or less strongly.
        file: The name of its exported file; of a combination, each part has its own.
        learning_rate: Its own learning rate; None for that of the run.
    """

    active: Name = "trained"
    scalable = False
    file: str
    learning_rate: float | None = None

    @abstractmethod
    def attach(self, model: TextToImage) -> None:
        """Injects the adapters `trained` and `ema`, equal at first, into a loaded model; `trained` is active.

        Args:
            model: The frozen text-to-image model, which is changed in place.

        Raises:
            ValueError: If the adapter does not fit the model, or is already attached.
        """

    @abstractmethod
    def tensors(self, name: Name) -> dict[str, nn.Parameter]:
        """Returns the live tensors of `trained` or `ema`, by the names that they have in an exported file."""

    @abstractmethod
    def _activate(self, name: Name) -> None:
        """Makes the model compute with the named tensors, or with none for `original`."""

    @property
    def parts(self) -> Sequence["Adapter"]:
        """The adapters that it consists of: by default itself alone."""
        return [self]

    def settings(self, name: Name) -> dict[str, Any]:
        """Returns what other programs must know beside the tensors of `trained` or `ema`."""
        return {}

    def save(self, folder: str | Path, name: Name = "ema") -> list[Path]:
        """Exports `trained` or `ema` as safetensors, in the layout that diffusers loads.

        Args:
            folder: Where to write; it is created.
            name: Which tensors.

        Returns:
            The paths of the files.
        """
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = [Path(folder, file) for file in dict.fromkeys(part.file for part in self.parts)]
        for path in paths:
            parts = [part for part in self.parts if part.file == path.name]
            state = {key: tensor for part in parts for key, tensor in part.state_dict(name).items()}
            settings = {key: value for part in parts for key, value in part.settings(name).items()}
            extra = {LORA_ADAPTER_METADATA_KEY: json.dumps(settings)} if settings else {}
            save_file(state, path, metadata={"format": "pt", **extra})
        return paths

    def load(self, folder: str | Path, name: Name = "ema") -> None:
        """Copies what `save` wrote into `trained` or `ema`.

        Args:
            folder: Where the files lie.
            name: Which tensors to overwrite.

        Raises:
            ValueError: If a file is missing or of another adapter.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        state: dict[str, Tensor] = {}
        for file in dict.fromkeys(part.file for part in self.parts):
            path = Path(folder, file)
            try:
                state |= load_file(path)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{str(path)!r} could not be read: {error}") from error
        self.load_state_dict(state, name)

    def rescale(self, scale: float, name: Name = "ema") -> None:
        """Changes how strongly `trained` or `ema` is applied, for good.

        Args:
            scale: A factor; 0 leaves the original model.
            name: Which of the two.

        Raises:
            ValueError: If the adapter is not `scalable`, and `scale` is not 1.
        """
        if scale != 1:
            raise ValueError(f"{type(self).__name__} has no strength to change: leave the scale at 1")

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Returns the trained tensors with their learning rates, for an optimizer.

        Args:
            learning_rate: That of a part that has none of its own.
        """
        rates = [learning_rate if part.learning_rate is None else part.learning_rate for part in self.parts]
        return [{"params": part.parameters(), "lr": rate} for part, rate in zip(self.parts, rates, strict=True)]

    def parameters(self) -> list[nn.Parameter]:
        """Returns the trained tensors θ."""
        return list(self.tensors("trained").values())

    @contextmanager
    def using(self, name: Name) -> Iterator[None]:
        """Makes the named model active inside a `with` block, and the previous one again after it.

        A graph built inside the block must also be back-propagated inside it, since checkpointed steps are
        computed again in the backward pass.

        Args:
            name: The model to use: `original`, `trained` or `ema`.
        """
        previous = self.active
        self.switch(name)
        try:
            yield
        finally:
            self.switch(previous)

    def switch(self, name: Name) -> None:
        """Makes the named model active until further notice.

        Args:
            name: The model to use: `original`, `trained` or `ema`.

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
        """Moves the average: θ_ema ← decay θ_ema + (1 - decay) θ.

        Args:
            decay: How much of the average stays, in [0, 1].
        """
        torch._foreach_lerp_(list(self.tensors("ema").values()), self.parameters(), 1 - decay)

    def state_dict(self, name: Name) -> dict[str, Tensor]:
        """Returns a copy of the tensors of `trained` or `ema`, on the CPU."""
        return {key: tensor.detach().cpu().clone() for key, tensor in self.tensors(name).items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], name: Name) -> None:
        """Copies tensors into `trained` or `ema`.

        Args:
            state: What `state_dict` returned, or what an exported file holds.
            name: Which tensors to overwrite.

        Raises:
            ValueError: If the names or shapes are not those of this adapter.
        """
        tensors = self.tensors(name)
        if state.keys() != tensors.keys():
            odd = sorted(state.keys() ^ tensors.keys())
            raise ValueError(f"the state is of another adapter: {len(odd)} tensors do not match, such as {odd[0]}")
        for key, tensor in tensors.items():
            if state[key].shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)}, but got {tuple(state[key].shape)}"
                raise ValueError(f"the state is of another adapter: {key} must have the shape {shapes}")
        for key, tensor in tensors.items():
            tensor.copy_(state[key])


def checked_rate(learning_rate: float | None) -> float | None:
    """Returns a part's own learning rate.

    Raises:
        ValueError: If it is negative.
    """
    if learning_rate is not None and learning_rate < 0:
        raise ValueError(f"`learning_rate` must not be negative, but got {learning_rate}")
    return learning_rate
