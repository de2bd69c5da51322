"""lit-align: align text-to-image diffusion models with preferences, on PyTorch Lightning."""

__version__ = "0.1.0"
