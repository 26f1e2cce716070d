"""How an application of somebody else is entered: by Hydra, by Lightning, in solo-learn."""
