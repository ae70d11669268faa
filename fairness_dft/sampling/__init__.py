"""The differentiable sampler and its gradient (paper, section 4.2)."""

from fairness_dft.sampling.gradients import GradientPath
from fairness_dft.sampling.sampler import Sampler

__all__ = ["GradientPath", "Sampler"]
