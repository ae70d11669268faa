"""Prompts P and the noise seeds of their images."""

from fairness_dft.prompts.datamodule import (
    DescriptorPrompts,
    MixedPrompts,
    OccupationPrompts,
    PromptModule,
    SportPrompts,
)

__all__ = ["DescriptorPrompts", "MixedPrompts", "OccupationPrompts", "PromptModule", "SportPrompts"]
