"""Adapters for audits only: any files that diffusers loads, or no adapter.

They are not trained. `ema` and `trained` are the same model, which differs from `original` by the content of the files.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from typing_extensions import override

from fairness_dft.adapters.base import Adapter, Name, parts_of
from fairness_dft.adapters.lora import LoRA
from fairness_dft.adapters.prompt_prefix import PromptPrefix
from fairness_dft.diffusion.any_pipeline import AnyPipeline
from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.files import one_line, quiet, weights_or_hub

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")  # of the pipeline that loads the files


class NoAdapter(Adapter):
    """No adapter: the base model alone."""

    @override
    def attach(self, model: TextToImage) -> None:
        self.switch("original")

    @override
    def tensors(self, name: Name) -> dict[str, nn.Parameter]:
        return {}

    @override
    def _activate(self, name: Name) -> None:
        pass


class DiffusersAdapter(NoAdapter):
    """LoRA weights and textual inversions, in any layout that diffusers loads, for audits only.

    The words of a textual inversion stand before every prompt except the empty one.

    Args:
        path: Safetensors file, or folder with a LoRA, textual inversions, or both; on this machine, or on the Hugging
            Face hub as owner/repository or owner/repository/file.

    Raises:
        ValueError: If there is no such file, there are several LoRAs, or a file cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = weights_or_hub(path)
        self.files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        if (self.path / LoRA.file).is_file():  # other files hold the same adapter in another layout
            self.files = [file for file in self.files if file.name in (LoRA.file, PromptPrefix.file)]
        if not self.files:
            raise ValueError(
                f"--adapter: {path!r} is not a safetensors file, a folder with safetensors files, or "
                "owner/repository or owner/repository/file on the Hugging Face hub"
            )
        self.lora = [file for file in self.files if any("lora" in key for key in tensor_names(file))]
        if len(self.lora) > 1:
            names = ", ".join(file.name for file in self.lora)
            raise ValueError(f"--adapter: {path!r} holds several LoRAs ({names}): choose one of these files")
        self.inversions = [file for file in self.files if file not in self.lora]

    @override
    def attach(self, model: TextToImage) -> None:
        self._model, self._words = model, ""
        if isinstance(model, AnyPipeline):
            self._attach_to_pipeline(model)
        else:
            self._attach_to_parts(dict(zip(PARTS, parts_of(model, *PARTS), strict=True)))
        self.switch("ema")
        model.requires_grad_(False)

    def _attach_to_pipeline(self, model: AnyPipeline) -> None:
        if self.inversions:
            name = self.inversions[0].name
            raise ValueError(f"--adapter: {name!r} is not a LoRA, the only adapter that an AnyPipeline takes")
        with self._loading():
            self._load_lora(model.pipeline)

    def _attach_to_parts(self, parts: dict[str, Any]) -> None:
        from diffusers import StableDiffusionPipeline

        tokenizer = parts["tokenizer"]
        known = set(tokenizer.get_vocab())
        parts |= {"scheduler": deepcopy(parts["scheduler"])}  # the pipeline changes its settings
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        with self._loading():
            pipeline: Any = StableDiffusionPipeline(**parts)  # type: ignore[no-untyped-call]
            self._load_lora(pipeline)
            for file in self.inversions:
                pipeline.load_textual_inversion(str(file.parent), weight_name=file.name)
        vocabulary = tokenizer.get_vocab()
        self._words = "".join(f"{word} " for word in sorted(set(vocabulary) - known, key=vocabulary.__getitem__))

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Turn any failure into one line; each layout of files raises its own error."""
        try:
            with quiet():
                yield
        except Exception as error:
            raise ValueError(f"--adapter: {str(self.path)!r} does not fit the model: {one_line(error)}") from error

    def _load_lora(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        for file in self.lora:
            pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="ema")
            pipeline.set_adapters("ema")
            self._check_fits(file)

    def _check_fits(self, file: Path) -> None:
        """Check that every matrix of the LoRA has its layer in the model; diffusers silently skips those without.

        Raises:
            ValueError: If a matrix has no layer.
        """
        names = [name for name in tensor_names(file) if re.search(r"lora[_.](A|B|down|up)\b|_lora\.(down|up)\b", name)]
        used = [name for name, _ in self._model.named_parameters() if re.search(r"\.lora_[AB]\.ema\.", name)]
        if len(used) < len(names):
            raise ValueError(
                f"only {len(used)} of the {len(names)} matrices of {file.name} have a layer in the model; "
                "the LoRA was made for another base model"
            )

    @override
    def _activate(self, name: Name) -> None:
        used = name != "original"
        self._model.prefix = self._words if used else ""
        if self.lora:
            self._pipeline.enable_lora() if used else self._pipeline.disable_lora()


def tensor_names(file: Path) -> Sequence[str]:
    """Return the names of the tensors in a safetensors file.

    Raises:
        ValueError: If it is not a safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--adapter: {str(file)!r} could not be read: {one_line(error)}") from error
