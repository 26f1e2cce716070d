"""Measures of a representation: kNN, linear probe, fine-tuning, the banks they use; and of delta."""
