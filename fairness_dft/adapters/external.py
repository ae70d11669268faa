"""Adapters that are only looked at: any that diffusers loads, or none.

Neither is trained. `ema` and `trained` are the same model, which differs from `original` by what the files hold.
"""

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from typing_extensions import override

from fairness_dft.adapters.base import Adapter, Name
from fairness_dft.adapters.lora import LoRA
from fairness_dft.adapters.prompt_prefix import PromptPrefix
from fairness_dft.diffusion.any_pipeline import AnyPipeline
from fairness_dft.diffusion.text_to_image import TextToImage
from fairness_dft.files import one_line, quiet, weights_or_hub


class NoAdapter(Adapter):
    """The original model alone."""

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
    """LoRA weights and textual inversions, such as `fairness_dft.export` and many trainers write.

    The words of a textual inversion stand before every prompt but the empty one.

    Args:
        path: a safetensors file, or a folder with a LoRA, textual inversions, or both; here or on the Hugging Face
            hub, as owner/repository or owner/repository/file.

    Raises:
        ValueError: if there is none, there are several LoRAs, or one cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = weights_or_hub(path)
        self.files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        if (self.path / LoRA.file).is_file():  # others are the same in another layout
            self.files = [file for file in self.files if file.name in (LoRA.file, PromptPrefix.file)]
        if not self.files:
            raise ValueError(
                f"--adapter: {path!r} is no safetensors file, nor a folder with any, nor owner/repository or "
                "owner/repository/file on the Hugging Face hub"
            )
        self.lora = [file for file in self.files if any("lora" in key for key in keys(file))]
        if len(self.lora) > 1:
            names = ", ".join(file.name for file in self.lora)
            raise ValueError(f"--adapter: {path!r} holds several LoRAs ({names}): name one of these files")
        self.inversions = [file for file in self.files if file not in self.lora]

    @override
    def attach(self, model: TextToImage) -> None:
        from diffusers import StableDiffusionPipeline

        if isinstance(model, AnyPipeline):
            return self._attach_to_pipeline(model)
        parts = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
        if missing := [part for part in parts if not hasattr(model, part)]:
            raise ValueError(f"--adapter: the text-to-image model has no {missing[0]}, which diffusers' adapters need")
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        self._model = model
        known = set(model.tokenizer.get_vocab())
        own = {part: getattr(model, part) for part in parts} | {"scheduler": deepcopy(model.scheduler)}  # it is changed
        try:
            with quiet():
                self._pipeline = StableDiffusionPipeline(**own, **none)
                for file in self.lora:
                    self._pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="ema")
                    self._pipeline.set_adapters("ema")
                    self._check_fits(file)
                for file in self.inversions:
                    self._pipeline.load_textual_inversion(str(file.parent), weight_name=file.name)
        except Exception as error:  # each layout raises its own
            raise ValueError(f"--adapter: {str(self.path)!r} does not fit the model: {one_line(error)}") from error
        words = sorted(set(model.tokenizer.get_vocab()) - known, key=model.tokenizer.get_vocab().get)
        self._words = "".join(f"{word} " for word in words)
        self.switch("ema")
        model.requires_grad_(False)

    def _attach_to_pipeline(self, model: AnyPipeline) -> None:
        if self.inversions:
            raise ValueError(f"--adapter: {self.inversions[0].name!r} is no LoRA, the only adapter of an AnyPipeline")
        self._model, self._pipeline, self._words = model, model.pipeline, ""
        try:
            with quiet():
                for file in self.lora:
                    model.pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="ema")
                    model.pipeline.set_adapters("ema")
                    self._check_fits(file)
        except Exception as error:  # each layout raises its own
            raise ValueError(f"--adapter: {str(self.path)!r} does not fit the model: {one_line(error)}") from error
        self.switch("ema")
        model.requires_grad_(False)

    def _check_fits(self, file: Path) -> None:
        """Every matrix of the LoRA must have found its layer; diffusers leaves out, in silence, those that do not.

        Raises:
            ValueError: if one did not.
        """
        held = [key for key in keys(file) if re.search(r"lora[_.](A|B|down|up)\b|_lora\.(down|up)\b", key)]
        used = [name for name, _ in self._model.named_parameters() if re.search(r"\.lora_[AB]\.ema\.", name)]
        if len(used) < len(held):
            raise ValueError(
                f"only {len(used)} of the {len(held)} matrices of {file.name} find a layer in it; "
                "it was made for another base model"
            )

    @override
    def _activate(self, name: Name) -> None:
        used = name != "original"
        self._model.prefix = self._words if used else ""
        if self.lora:
            self._pipeline.enable_lora() if used else self._pipeline.disable_lora()


def keys(file: Path) -> Sequence[str]:
    """Names of the tensors of a safetensors file.

    Raises:
        ValueError: if it is none.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--adapter: {str(file)!r} could not be read: {one_line(error)}") from error
