"""lit-align: align text-to-image diffusion models with preferences, on PyTorch Lightning."""

from lit_align.moved import install as _install_moved_modules

__version__ = "0.1.0"

_install_moved_modules()
