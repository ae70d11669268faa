"""The algorithm as a LightningModule, and the callbacks that watch it."""

from fairness_dft.training.module import FairFinetuning

__all__ = ["FairFinetuning"]
