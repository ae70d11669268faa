"""The shared base of all models that diffusers loads: locate, check, load once, and fail with one error text."""

import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from typing_extensions import override

from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.files import on_hub, quiet, resolve

Precision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class ModelSource:
    """The place that diffusers loads a model from.

    Attributes:
        name: A local folder, or the name of a model on the Hugging Face hub.
        is_folder: Whether `name` is a local folder.
        is_reachable: Whether the folder exists, or the hub answers that it has the model.
    """

    name: str
    is_folder: bool
    is_reachable: bool

    @classmethod
    def locate(cls, path: str) -> "ModelSource":
        """Look for a model on this machine first and then on the hub, which is asked once.

        Args:
            path: A folder, as `files.resolve` finds it, or the name of a model on the hub.
        """
        folder = resolve(path)
        return cls(str(folder), True, True) if folder.is_dir() else cls(path, False, on_hub(path))

    @property
    def options(self) -> dict[str, bool]:
        """The arguments that keep diffusers away from the network where it is of no use."""
        return {"local_files_only": self.is_folder or not self.is_reachable}


class DiffusersModel(TextToImage):
    """A frozen text-to-image model that diffusers loads.

    A subclass implements `_check` and `_load`. Both get the source of the model and do their reading inside
    `_loading`, which turns any failure into one error text.

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
        self.is_loaded = False

    @override
    def check(self) -> None:
        self._check(ModelSource.locate(self.path))

    @override
    def load(self) -> None:
        if self.is_loaded:
            return
        source = ModelSource.locate(self.path)
        self._check(source)
        self._load(source)
        self.freeze()
        self.is_loaded = True

    def freeze(self) -> None:
        """Freeze all networks."""
        self.requires_grad_(False).eval()

    @abstractmethod
    def _check(self, source: ModelSource) -> None:
        """Reject a model that `_load` cannot load, from its small configuration files."""

    @abstractmethod
    def _load(self, source: ModelSource) -> None:
        """Set the scheduler, the networks and what goes with them."""

    def _weights(self, source: ModelSource) -> dict[str, Any]:
        """Return the arguments with which weights are loaded: the right precision, and nothing unpickled."""
        return {**source.options, "torch_dtype": self.weights_dtype, "use_safetensors": True}

    def _read_index(self, source: ModelSource) -> dict[str, Any]:
        """Read model_index.json, which lists the parts of a pipeline."""
        from diffusers import DiffusionPipeline

        with self._loading(source):
            index: dict[str, Any] = DiffusionPipeline.load_config(source.name, **source.options)
        return index

    @contextmanager
    def _loading(self, source: ModelSource) -> Iterator[None]:
        """Turn any failure while loading into the one error text; each library and file format raises its own error.

        Raises:
            ValueError: If the block raises any error.
        """
        try:
            with quiet():
                yield
        except Exception as error:
            missing = "no such local folder, and no such model within reach on the Hugging Face hub"
            raise ValueError(self._failure(source, str(error) if source.is_reachable else missing)) from error

    def _failure(self, source: ModelSource, reason: str) -> str:
        """Say in one line which model cannot be loaded, why, and what to do."""
        reason = (reason.strip() or "unknown reason").splitlines()[0].rstrip(".")
        way_out = "Give"
        if not source.is_folder and re.fullmatch(r"[\w.-]+/[\w.-]+", self.path):
            way_out = f"Download it on a machine with network access (`hf download {self.path}`), or give"
        return (
            f"Could not load the text-to-image model {self.path!r} ({reason}). "
            f"{way_out} a local folder in the layout of {self.layout} "
            "(--model.generator.init_args.path FOLDER), or run the miniature that ships with this project "
            "(--config experiments/parts/portraits.yaml)."
        )


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
