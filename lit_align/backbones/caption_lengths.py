"""Tokens of captions, and a count of those that are longer than the text encoder reads."""

import logging
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

log = logging.getLogger(__name__)


class CaptionCount:
    """Captions that a tokenizer has seen and cut."""

    def __init__(self) -> None:
        self.seen = self.cut = self.longest = 0
        self.due = 1  # cut captions at which the next line is due

    def add(self, lengths: list[int], limit: int, prompts: list[str]) -> None:
        """Count captions, and say so at the first one that is cut, the tenth, the hundredth and so on."""
        self.seen += len(lengths)
        too_long = [number for number, length in enumerate(lengths) if length > limit]
        self.cut += len(too_long)
        self.longest = max(self.longest, *lengths)
        if too_long and self.cut >= self.due:
            while self.due <= self.cut:
                self.due *= 10
            self._say(limit, prompts[too_long[0]])

    def _say(self, limit: int, example: str) -> None:
        text = (
            f"{self.cut} of {self.seen} captions so far are longer than the {limit} tokens that the text encoder reads "
            f"(longest: {self.longest}); the rest of them is cut, as of {example[:80]!r}"
        )
        if text not in _said:  # SDXL's two tokenizers cut the same captions
            _said.add(text)
            log.warning(text)


_said: set[str] = set()
_counts: "WeakKeyDictionary[Any, CaptionCount]" = WeakKeyDictionary()


def tokenize(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Tokenize captions, padded or cut to the tokenizer's length; those that are cut are counted and said.

    Returns:
        Ids, (batch, length).
    """
    limit = tokenizer.model_max_length
    tokens = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    mask = tokens.get("attention_mask")
    full = [True] * len(prompts) if mask is None else mask.all(dim=1).tolist()  # only these can have been cut
    lengths = [limit if is_full else 0 for is_full in full]
    if any(full):
        again = tokenizer([prompt for prompt, is_full in zip(prompts, full, strict=True) if is_full], verbose=False)
        exact = iter(map(len, again.input_ids))
        lengths = [next(exact) if is_full else 0 for is_full in full]
    _counts.setdefault(tokenizer, CaptionCount()).add(lengths, limit, prompts)
    ids: Tensor = tokens.input_ids
    return ids
