"""The attack: the loop that optimises a perturbation, its rows and its file, noise, injection."""
