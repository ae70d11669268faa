"""What is measured: bias with its floor and interval, significance, fidelity (paper, section 5)."""

from fairness_dft.metrics.fidelity import Inception

__all__ = ["Inception"]
