"""The noise that an image starts from."""

import hashlib
import json


def prompt_seed(prompt: str, seed: int) -> int:
    """The seed of a prompt's noise, 32 bits: whatever model, batch, process or file of prompts draws it.

    Args:
        prompt: as the model is given it.
        seed: of the evaluation.
    """
    return int.from_bytes(hashlib.blake2b(json.dumps([prompt, seed]).encode(), digest_size=4).digest(), "big")
