"""The algorithm as a LightningModule, and the callbacks that watch it."""

from fairness_dft.training.bias_monitor import BiasMonitor
from fairness_dft.training.callbacks import AdapterAverage, AdapterCheckpoint, StepBar, Throughput
from fairness_dft.training.dashboard import Dashboard
from fairness_dft.training.evaluation import Evaluation
from fairness_dft.training.image_grid import ImageGrid
from fairness_dft.training.interruption import GracefulStop, SkipNonFiniteSteps
from fairness_dft.training.module import FairFinetuning
from fairness_dft.training.quality_monitor import QualityMonitor

__all__ = [
    "AdapterAverage",
    "AdapterCheckpoint",
    "BiasMonitor",
    "Dashboard",
    "Evaluation",
    "FairFinetuning",
    "GracefulStop",
    "ImageGrid",
    "QualityMonitor",
    "SkipNonFiniteSteps",
    "StepBar",
    "Throughput",
]
