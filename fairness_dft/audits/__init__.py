"""Audits: what is measured without training anything, a model or images that others made."""
