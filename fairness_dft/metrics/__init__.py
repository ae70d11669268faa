"""Measures of fairness and fidelity: bias with its floor and interval, significance, distances (paper, section 5)."""

from fairness_dft.metrics.fidelity import Inception

__all__ = ["Inception"]
