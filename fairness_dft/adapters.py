"""What is trained: a small set of tensors θ inside one copy of the frozen model.

A low-rank adapter (LoRA) adds to each chosen weight matrix W a product of two thin ones,

    W' = W + (alpha / rank) B A,    A with shape (rank, inputs),    B with shape (outputs, rank), at first 0,

and the exponential moving average (EMA) of what is trained follows it as θ_ema ← decay θ_ema + (1 - decay) θ.

The same copy of the model is thereby three models, of which one is active at a time: `original` (no adapter),
`trained` (θ) and `ema` (θ_ema).

References:
    LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021). https://arxiv.org/abs/2106.09685
"""

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from fairness_dft.diffusion import TextToImage

Name = Literal["original", "trained", "ema"]


class Adapter(ABC):
    """A set of trained tensors inside a frozen model, and their moving average.

    A kind of adapter says how it is injected (`attach`), which tensors it has (`tensors`), which of them the
    model uses (`_activate`) and what its file is called and says beside the tensors (`save`).

    Attributes:
        active: The name of the model in use.
    """

    active: Name = "trained"

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

    @abstractmethod
    def save(self, folder: str | Path, name: Name = "ema") -> Path:
        """Exports `trained` or `ema` as safetensors, in the layout that diffusers loads.

        Args:
            folder: Where to write; it is created.
            name: Which tensors.

        Returns:
            The path of the file.
        """

    def parameters(self) -> list[nn.Parameter]:
        """Returns the trained tensors θ, for an optimizer."""
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


class TextEncoderLoRA(Adapter):
    """LoRA in the attention and the MLP of the text encoder.

    Args:
        rank: The rank of each product B A.
        alpha: The strength, relative to `rank`; equal to it by default.
        target_modules: The names of the linear layers that get one.

    Raises:
        ValueError: If the rank is not positive.
    """

    def __init__(
        self,
        rank: int = 50,
        alpha: float | None = None,
        target_modules: Sequence[str] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ) -> None:
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, but got {rank}")
        self.rank = rank
        self.alpha = rank if alpha is None else alpha
        self.target_modules = list(target_modules)

    @override
    def attach(self, model: TextToImage) -> None:
        from peft import LoraConfig

        if hasattr(model.text_encoder, "peft_config"):
            raise ValueError("the text encoder already has an adapter: load the model anew to attach another")
        linear = {
            path.rpartition(".")[2]
            for path, layer in model.text_encoder.named_modules()
            if isinstance(layer, nn.Linear)
        }
        unknown = sorted(set(self.target_modules) - linear)
        if unknown:
            raise ValueError(f"`target_modules` must be among {sorted(linear)}, but got {unknown}")
        self._text_encoder = model.text_encoder
        for name in ("trained", "ema"):
            config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=self.target_modules)
            with warnings.catch_warnings():
                # It is the second one, as intended.
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                self._text_encoder.add_adapter(config, name)
            for tensor in self.tensors(name).values():
                # PEFT follows the precision of the frozen weights, which may be too coarse to learn in.
                tensor.data = tensor.data.float()
        self.load_state_dict(self.state_dict("trained"), "ema")
        self.switch("trained")

    @override
    def tensors(self, name: Name) -> dict[str, nn.Parameter]:
        from peft.tuners.lora import LoraLayer

        found = {}
        for path, layer in self._text_encoder.named_modules():
            if isinstance(layer, LoraLayer):
                # Without this level, which transformers dropped, other programs do not know the names.
                path = f"text_encoder.text_model.{path.removeprefix('text_model.')}"
                # PEFT's own names, lora_A and lora_B, diffusers knows in the attention only.
                found[f"{path}.lora_linear_layer.down.weight"] = layer.lora_A[name].weight
                found[f"{path}.lora_linear_layer.up.weight"] = layer.lora_B[name].weight
        return found

    @override
    def _activate(self, name: Name) -> None:
        if name == "original":
            self._text_encoder.disable_adapters()
        else:
            self._text_encoder.enable_adapters()
            self._text_encoder.set_adapter(name)

    @override
    def save(self, folder: str | Path, name: Name = "ema") -> Path:
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
        from safetensors.torch import save_file

        path = Path(folder, LORA_WEIGHT_NAME_SAFE)
        path.parent.mkdir(parents=True, exist_ok=True)
        config = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": self.target_modules}
        config = json.dumps({f"text_encoder.{key}": value for key, value in config.items()})
        save_file(self.state_dict(name), path, metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: config})
        return path
