"""Values of options, apart from the libraries that act on them, so that --help imports none."""

from typing import Literal

Precision = Literal["fp32", "fp16", "bf16"]
Sampler = Literal["euler", "ddim", "dpm++"]
OnError = Literal["raise", "skip"]  # on a broken sample
ImageFormat = Literal["png", "jpeg", "webp"]
Checkpointing = bool | Literal["selective"]
