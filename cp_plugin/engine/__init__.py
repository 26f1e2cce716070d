"""The embedded engine: SimCLR, MoCo v2 and BYOL from Lightly's parts, in solo-learn's schema."""
