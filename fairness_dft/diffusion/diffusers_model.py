"""The shared base of all models that diffusers loads: what they check, how they load, schedulers and precision."""

import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import nn
from typing_extensions import override

from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.files import Location, quiet, resolve
from fairness_dft.networks.frozen import MINIATURE, loading_error

Precision = Literal["float32", "float16", "bfloat16"]


class DiffusersModel(TextToImage):
    """A frozen text-to-image model that diffusers loads.

    A subclass implements `_check`, which reads the small configuration files, and `_load`.

    Args:
        path: Folder in the layout of a diffusers pipeline, relative to the working directory or to the repository, or
            name of a model on the Hugging Face hub.
        weights_dtype: Precision of the frozen weights in memory, whatever precision their files have.
        resolution: Height and width of the images, in pixels; by default those of the model's training.

    Raises:
        ValueError: If `weights_dtype` is not one of the allowed values.

    Attributes:
        layout: The name of the folder layout, for the error text.
    """

    layout = "a diffusers pipeline"

    def __init__(self, path: str, weights_dtype: Precision = "float32", resolution: int | None = None) -> None:
        super().__init__()
        if weights_dtype not in get_args(Precision):
            raise ValueError(f"`weights_dtype` must be float32, float16 or bfloat16, but got {weights_dtype!r}")
        self.path = path
        self.weights_dtype: torch.dtype = getattr(torch, weights_dtype)
        self.resolution = resolution

    @override
    def check(self) -> None:
        self._check(self.find())

    @override
    def load(self) -> None:
        if self._loaded:  # an adapter may be attached by now, and must stay trainable
            return
        self.check()
        super().load()

    @override
    def error(self, reason: object) -> ValueError:
        allowed = f"a local folder in the layout of {self.layout} (--model.generator.init_args.path FOLDER)"
        way_out = MINIATURE
        if not resolve(self.path).is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", self.path):
            way_out = f"download it on a machine with network access (`hf download {self.path}`), or {MINIATURE}"
        return loading_error(self.what, self.path, reason, allowed, way_out)

    @abstractmethod
    def _check(self, location: Location) -> None:
        """Reject a model that `_load` cannot load, from its small configuration files; this changes nothing."""

    def _weights(self, location: Location) -> dict[str, Any]:
        """Return the arguments with which weights are loaded: the right precision, and nothing unpickled."""
        return {**location.options, "torch_dtype": self.weights_dtype, "use_safetensors": True}

    def _read_index(self, location: Location) -> dict[str, Any]:
        """Read model_index.json, which lists the parts of a pipeline."""
        from diffusers import DiffusionPipeline

        with self._reading(location):
            index: dict[str, Any] = DiffusionPipeline.load_config(location.source, **location.options)
        return index

    @contextmanager
    def _reading(self, location: Location) -> Iterator[None]:
        """Turn any failure while reading a file into the one error text; each library raises its own error.

        Raises:
            ValueError: If the block raises any error.
        """
        try:
            with quiet():
                yield
        except Exception as error:
            raise self.error(error if location.reachable else location.missing) from error


def native_precision(network: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a network that is frozen in half precision computes in half precision.

    Autocast would convert its tensors to single precision and back around each normalization. This costs time and
    memory and gains nothing, because the weights are rounded already. Trained weights are in single precision and need
    autocast.
    """
    if weight_dtype(network) not in (torch.float16, torch.bfloat16) or has_trained_weights(network):
        return nullcontext()
    return torch.autocast(next(network.parameters()).device.type, enabled=False)


def weight_dtype(network: nn.Module) -> torch.dtype:
    """Return the data type of the weights, without the walk through all modules behind diffusers' own `dtype`."""
    return next(network.parameters()).dtype


def has_trained_weights(network: nn.Module) -> bool:
    """Return whether any weight of a network is trained."""
    return any(parameter.requires_grad for parameter in network.parameters())


def token_limit(tokenizer: Any, text_encoder: Any) -> int:
    """Return the number of tokens that a text encoder reads, including those of start and end."""
    return int(min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings))


def find_scheduler(name: str) -> Any:
    """Return the diffusers scheduler class with this name.

    Raises:
        ValueError: If diffusers has no such scheduler.
    """
    import diffusers

    scheduler = getattr(diffusers, name, None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        examples = "DPMSolverMultistepScheduler, DDIMScheduler or EulerDiscreteScheduler"
        raise ValueError(f"`scheduler` must be the name of a diffusers scheduler, such as {examples}, but got {name!r}")
    return scheduler
