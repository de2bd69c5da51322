"""The images of one model on the disk, and what scorers gave them: each is drawn once and scored once."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from lit_align.common.files import write_text
from lit_align.data.images import decode
from lit_align.scoring.base import Scorer

KEPT_AT_A_TIME = 128  # scores: what a killed run may lose


class Gallery:
    """One image a prompt; several processes may add to it at a time.

    Args:
        folder: for all that this model draws in this way; its name is to say what draws, and how.
        prompts: each once.
        seed: of the noise, see `prompt_seed`.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], seed: int) -> None:
        self.folder, self.prompts = folder, prompts
        self.paths = [folder / f"{_digest(json.dumps([prompt, seed]).encode())}.png" for prompt in prompts]
        self._known: dict[int, tuple[tuple[int, int], str]] = {}  # by number: what a file was when its key was read

    def keys(self, numbers: Iterable[int]) -> list[str | None]:
        """What scores are kept under: prompt and bytes of an image; None where there is no image.

        Args:
            numbers: of prompts.
        """
        return [self._key(number) for number in numbers]

    def _key(self, number: int) -> str | None:
        path = self.paths[number]
        try:
            about = path.stat()
            now = (about.st_ino, about.st_mtime_ns)
            if number not in self._known or self._known[number][0] != now:
                self._known[number] = (now, self._key_of(number, path.read_bytes()))
        except FileNotFoundError:
            return None
        return self._known[number][1]

    def _key_of(self, number: int, data: bytes) -> str:
        return _digest(self.prompts[number].encode() + b"\0" + data)

    def scores(self, fingerprint: str) -> dict[str, float]:
        """All that a scorer has given so far, by key.

        Args:
            fingerprint: of the scorer.
        """
        known: dict[str, float] = {}
        for path in sorted((self.folder / "scores" / fingerprint).glob("*.json")):
            known |= json.loads(path.read_text(encoding="utf-8"))
        return known

    def score(
        self,
        scorer: Scorer,
        fingerprint: str,
        numbers: Sequence[int],
        batch_size: int,
        scored: Callable[[int], object],
    ) -> None:
        """Score images, and keep the scores in files of their own as soon as there are some.

        Args:
            scorer: where it computes.
            fingerprint: of the scorer.
            numbers: of prompts whose images are there.
            batch_size: images at a time.
            scored: is told how many more have scores.
        """
        new: dict[str, float] = {}
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            data = [self.paths[number].read_bytes() for number in batch]
            images = [torch.from_numpy(np.array(decode(one))).permute(2, 0, 1) for one in data]
            scores = scorer.score(images, [self.prompts[number] for number in batch]).tolist()
            # Of these bytes: another run may have changed the file since.
            new |= dict(zip(map(self._key_of, batch, data), scores, strict=True))
            if len(new) >= KEPT_AT_A_TIME:
                self._keep(fingerprint, new)
                new = {}
            scored(len(batch))
        if new:
            self._keep(fingerprint, new)

    def _keep(self, fingerprint: str, scores: dict[str, float]) -> None:
        name = _digest("".join(sorted(scores)).encode())
        write_text(self.folder / "scores" / fingerprint / f"{name}.json", json.dumps(scores, indent=0) + "\n")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
