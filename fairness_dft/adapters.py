"""What is trained: a small set of tensors θ inside one copy of the frozen model.

A low-rank adapter (LoRA) in the text encoder or the U-Net adds to each chosen weight matrix W a product of two
thin ones,

    W' = W + (alpha / rank) B A,    A with shape (rank, inputs),    B with shape (outputs, rank), at first 0;

a soft prompt prefix (prompt_prefix.py) puts trained tokens before the prompt; and several adapters can be trained
together. The exponential moving average (EMA) of what is trained follows it as θ_ema ← decay θ_ema + (1 - decay) θ.

The same copy of the model is thereby three models, of which one is active at a time: `original` (no adapter),
`trained` (θ) and `ema` (θ_ema).

References:
    LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021). https://arxiv.org/abs/2106.09685
"""

import json
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from fairness_dft.diffusion import TextToImage

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


class LoRA(Adapter):
    """LoRA in one network of the model.

    Args:
        rank: The rank of each product B A.
        alpha: The scale of the products, relative to `rank`; equal to it by default.
        strength: How strongly `ema` is applied, as a factor of its products; those of `trained` always count once.
            An average of many adapters may change the model less than they do, or than it should; like the scale at
            which LoRA is applied elsewhere, this is chosen on validation prompts, after training.
        target_modules: The names of the linear layers that get one; by default `modules`.
        learning_rate: The learning rate of this part; that of the run by default.

    Raises:
        ValueError: If the rank or the strength is not positive, or the learning rate is negative.

    Attributes:
        modules: The names of the layers that get one by default.
        component: The name of the network, as an attribute of the model and in an exported file.
        factors: The names of A and B in an exported file.
    """

    file = "pytorch_lora_weights.safetensors"
    scalable = True
    component: str
    modules: Sequence[str]
    factors = ("lora_A", "lora_B")

    def __init__(
        self,
        rank: int = 50,
        alpha: float | None = None,
        strength: float = 1.0,
        target_modules: Sequence[str] | None = None,
        learning_rate: float | None = None,
    ) -> None:
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, but got {rank}")
        if not strength > 0:
            raise ValueError(f"`strength` must be positive, but got {strength}")
        self.rank = rank
        self.alpha = rank if alpha is None else alpha
        self.strength = strength
        self.target_modules = list(self.modules if target_modules is None else target_modules)
        self.learning_rate = checked_rate(learning_rate)

    @override
    def attach(self, model: TextToImage) -> None:
        from peft import LoraConfig

        network = getattr(model, self.component, None)
        if network is None:
            raise ValueError(f"the text-to-image model has no {self.component}: choose another adapter")
        if hasattr(network, "peft_config"):
            where = self.component.replace("_", " ").replace("unet", "U-Net")
            raise ValueError(f"the {where} already has an adapter: load the model anew to attach another")
        linear = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
        unknown = [name for name in self.target_modules if not any(f".{path}".endswith(f".{name}") for path in linear)]
        if unknown:
            names = sorted({re.sub(r".*?([^.]+(\.\d+)*)$", r"\1", path) for path in linear})
            raise ValueError(f"`target_modules` must be among {names}, but got {unknown}")
        self._network = network
        for name in ("trained", "ema"):
            config = LoraConfig(r=self.rank, lora_alpha=self.alpha_of(name), target_modules=self.target_modules)
            with warnings.catch_warnings():
                # It is the second one, as intended.
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                network.add_adapter(config, name)
            for tensor in self.tensors(name).values():
                # PEFT follows the precision of the frozen weights, which may be too coarse to learn in.
                tensor.data = tensor.data.float()
        self.load_state_dict(self.state_dict("trained"), "ema")
        self.switch("trained")

    @override
    def tensors(self, name: Name) -> dict[str, nn.Parameter]:
        from peft.tuners.lora import LoraLayer

        found = {}
        for path, layer in self._network.named_modules():
            if isinstance(layer, LoraLayer):
                for factor, matrix in zip(self.factors, (layer.lora_A, layer.lora_B), strict=True):
                    found[f"{self.component}.{self._exported(path)}.{factor}.weight"] = matrix[name].weight
        return found

    def alpha_of(self, name: Name) -> float:
        """Returns the scale of the products of `trained` or `ema`, relative to the rank."""
        return self.alpha * self.strength if name == "ema" else self.alpha

    def _exported(self, path: str) -> str:
        """Returns the path of a layer as other programs know it."""
        return path

    @override
    def settings(self, name: Name) -> dict[str, Any]:
        settings = {"r": self.rank, "lora_alpha": self.alpha_of(name), "target_modules": self.target_modules}
        return {f"{self.component}.{key}": value for key, value in settings.items()}

    @override
    @torch.no_grad()
    def rescale(self, scale: float, name: Name = "ema") -> None:
        for key, tensor in self.tensors(name).items():
            if key.endswith(f".{self.factors[1]}.weight"):
                tensor.mul_(scale)

    @override
    def _activate(self, name: Name) -> None:
        if name == "original":
            self._network.disable_adapters()
        else:
            self._network.enable_adapters()
            self._network.set_adapter(name)


class TextEncoderLoRA(LoRA):
    """LoRA in the text encoder, by default in its attention and MLP; see `LoRA`."""

    component = "text_encoder"
    modules = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    # PEFT's own names, lora_A and lora_B, diffusers knows in the attention only.
    factors = ("lora_linear_layer.down", "lora_linear_layer.up")

    @override
    def _exported(self, path: str) -> str:
        # Without this level, which transformers dropped, other programs do not know the names.
        return f"text_model.{path.removeprefix('text_model.')}"


class UNetLoRA(LoRA):
    """LoRA in the U-Net, by default in its attention; see `LoRA`."""

    component = "unet"
    modules = ("to_q", "to_k", "to_v", "to_out.0")


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


def checked_rate(learning_rate: float | None) -> float | None:
    """Returns a part's own learning rate.

    Raises:
        ValueError: If it is negative.
    """
    if learning_rate is not None and learning_rate < 0:
        raise ValueError(f"`learning_rate` must not be negative, but got {learning_rate}")
    return learning_rate
