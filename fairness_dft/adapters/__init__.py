"""Adapters: the small sets of trained tensors θ on the frozen text-to-image model."""

from fairness_dft.adapters.base import Adapter
from fairness_dft.adapters.combined import Combined
from fairness_dft.adapters.external import DiffusersAdapter, NoAdapter
from fairness_dft.adapters.lora import TextEncoderLoRA, UNetLoRA
from fairness_dft.adapters.prompt_prefix import PromptPrefix

__all__ = ["Adapter", "Combined", "DiffusersAdapter", "NoAdapter", "PromptPrefix", "TextEncoderLoRA", "UNetLoRA"]
