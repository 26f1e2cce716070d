"""Mutated files from elsewhere: each ends in a clear error or a correct result."""
