"""Measures of a representation: kNN, linear probe, fine-tuning, and the banks they use."""
