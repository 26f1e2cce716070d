"""Measures of a representation (kNN, probes, fine-tuning, their banks) and of a perturbation."""
