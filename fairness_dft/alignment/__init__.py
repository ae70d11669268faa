"""Distributional alignment: targets by optimal transport, and the losses (paper, sections 4.1 and 4.3)."""
