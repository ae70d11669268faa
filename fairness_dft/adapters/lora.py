"""Low-rank adapters (LoRA): the trained tensors θ inside one copy of the frozen model.

LoRA in the text encoder or the U-Net adds a product of two thin matrices to each chosen weight matrix W,

    W' = W + (alpha / rank) B A,    A with shape (rank, inputs),    B with shape (outputs, rank), initially 0.

The exponential moving average (EMA) of the trained tensors is θ_ema ← decay θ_ema + (1 - decay) θ.

The same copy of the model thus holds three models, one of which is active at a time: `original` (no adapter),
`trained` (θ) and `ema` (θ_ema).

References:
    LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021). https://arxiv.org/abs/2106.09685
"""

import re
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from typing_extensions import override

from fairness_dft.adapters.base import Adapter, Name, checked_rate, parts_of
from fairness_dft.diffusion.text_to_image import TextToImage


class LoRA(Adapter):
    """LoRA in one network of the model.

    Args:
        rank: Rank of each product B A.
        alpha: Scale of the products, relative to `rank`; by default equal to `rank`.
        strength: Factor of the products of `ema`; the factor of `trained` is always 1. An average of many adapters
            may change the model less than each of them does, or less than it should. Choose the strength on
            validation prompts after training, like the scale of any other LoRA.
        target_modules: Names of the linear layers that are adapted; by default `modules`.
        learning_rate: Learning rate of this adapter; by default that of the run.

    Raises:
        ValueError: If the rank or the strength is not positive, or the learning rate is negative.

    Attributes:
        modules: The names of the layers that are adapted by default.
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

        [network] = parts_of(model, self.component)
        self._check_fits(network)
        self._network = network
        for name in ("trained", "ema"):
            alpha: Any = self.alpha_of(name)  # PEFT declares an integer, and takes any number
            config = LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=self.target_modules)
            with warnings.catch_warnings():
                # The second configuration is intended.
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                network.add_adapter(config, name)
            for tensor in self.tensors(name).values():
                # PEFT uses the precision of the frozen weights, which may be too coarse to learn in.
                tensor.data = tensor.data.float()
        self.load_state_dict(self.state_dict("trained"), "ema")
        self.switch("trained")

    def _check_fits(self, network: nn.Module) -> None:
        """Reject a network that has an adapter already, or lacks the target modules."""
        if hasattr(network, "peft_config"):
            where = self.component.replace("_", " ").replace("unet", "U-Net")
            raise ValueError(f"the {where} already has an adapter: load the model again to attach another")
        linear = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
        unknown = [name for name in self.target_modules if not any(f".{path}".endswith(f".{name}") for path in linear)]
        if unknown:
            names = sorted({re.sub(r".*?([^.]+(\.\d+)*)$", r"\1", path) for path in linear})
            raise ValueError(f"`target_modules` must be among {names}, but got {unknown}")

    @override
    def tensors(self, name: Name) -> dict[str, nn.Parameter]:
        from peft.tuners.lora import LoraLayer

        tensors: dict[str, nn.Parameter] = {}
        for path, layer in self._network.named_modules():
            if isinstance(layer, LoraLayer):
                for factor, matrix in zip(self.factors, (layer.lora_A, layer.lora_B), strict=True):
                    weight = cast(nn.Parameter, matrix[name].weight)
                    tensors[f"{self.component}.{self._exported(path)}.{factor}.weight"] = weight
        return tensors

    def alpha_of(self, name: Name) -> float:
        """Return the scale of the products of `trained` or `ema`, relative to the rank."""
        return self.alpha * self.strength if name == "ema" else self.alpha

    def _exported(self, path: str) -> str:
        """Return the path of a layer as other programs know it."""
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
    """LoRA in the text encoder, by default in its attention and MLP; see `LoRA`.

    Example:
        >>> from fairness_dft.diffusion import StableDiffusion
        >>> model = StableDiffusion("data/portraits/pipeline")
        >>> model.load()
        >>> adapter = TextEncoderLoRA(rank=4)
        >>> adapter.attach(model)
        >>> with torch.no_grad():
        ...     for name, tensor in adapter.tensors("trained").items():
        ...         if name.endswith("up.weight"):  # B, which is zero before training
        ...             _ = tensor.fill_(0.1)
        >>> trained = model.encode(["a chef"])
        >>> with adapter.using("original"):
        ...     base = model.encode(["a chef"])
        >>> torch.equal(trained, base)
        False
    """

    component = "text_encoder"
    modules = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    # In a text encoder, diffusers reads PEFT's own names, lora_A and lora_B, for the attention only.
    factors = ("lora_linear_layer.down", "lora_linear_layer.up")

    @override
    def _exported(self, path: str) -> str:
        # transformers dropped this level, but other programs need it to recognize the names.
        return f"text_model.{path.removeprefix('text_model.')}"


class UNetLoRA(LoRA):
    """LoRA in the U-Net, by default in its attention; see `LoRA`.

    Example:
        >>> from fairness_dft.diffusion import StableDiffusion
        >>> model = StableDiffusion("data/portraits/pipeline")
        >>> model.load()
        >>> adapter = UNetLoRA(rank=4, target_modules=["to_q", "to_k"])
        >>> adapter.attach(model)
        >>> {tensor.shape[0] for name, tensor in adapter.tensors("trained").items() if "lora_A" in name}
        {4}
    """

    component = "unet"
    modules = ("to_q", "to_k", "to_v", "to_out.0")
