"""The images of one model on the disk and their scores: each image is drawn once and scored once."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lit_align.common.files import write_text
from lit_align.data.decoder import decode_pixels
from lit_align.data.images import to_planes
from lit_align.scoring.base import Scorer

KEPT_AT_A_TIME = 128  # scores: as many may be lost when a run is killed


class ImageStore:
    """One image per prompt. Several processes may add images and scores at a time.

    Args:
        folder: of all images that this model draws with these settings; its name must identify both.
        prompts: without duplicates.
        seed: of the noise, see `prompt_seed`.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], seed: int) -> None:
        self.folder, self.prompts = folder, prompts
        self.paths = [folder / f"{_digest(json.dumps([prompt, seed]).encode())}.png" for prompt in prompts]
        self._known: dict[int, tuple[tuple[int, int], str]] = {}  # by number: state of the file, and its key

    def keys(self, numbers: Iterable[int]) -> list[str | None]:
        """Keys of the images' scores: digests of prompt and bytes; None where there is no image.

        Args:
            numbers: of prompts.
        """
        return [self._key(number) for number in numbers]

    def _key(self, number: int) -> str | None:
        path = self.paths[number]
        try:
            stat = path.stat()
            state = (stat.st_ino, stat.st_mtime_ns)
            if number not in self._known or self._known[number][0] != state:
                self._known[number] = (state, self._key_of(number, path.read_bytes()))
        except FileNotFoundError:
            return None
        return self._known[number][1]

    def _key_of(self, number: int, data: bytes) -> str:
        return _digest(self.prompts[number].encode() + b"\0" + data)

    def scores(self, fingerprint: str) -> dict[str, float]:
        """All scores that are stored of a scorer, by key.

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
        report: Callable[[int], object],
    ) -> None:
        """Score images, and store the scores every `KEPT_AT_A_TIME` images.

        Args:
            scorer: on its device.
            fingerprint: of the scorer.
            numbers: of prompts whose images exist.
            batch_size: images at a time.
            report: called after each batch with the number of images that were scored.
        """
        new: dict[str, float] = {}
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            data = [self.paths[number].read_bytes() for number in batch]
            images = [to_planes(decode_pixels(one)) for one in data]
            scores = scorer.score(images, [self.prompts[number] for number in batch]).tolist()
            # The key of the bytes that were scored: another run may have changed the file since.
            new |= dict(zip(map(self._key_of, batch, data), scores, strict=True))
            if len(new) >= KEPT_AT_A_TIME:
                self._keep(fingerprint, new)
                new = {}
            report(len(batch))
        if new:
            self._keep(fingerprint, new)

    def _keep(self, fingerprint: str, scores: dict[str, float]) -> None:
        name = _digest("".join(sorted(scores)).encode())
        write_text(self.folder / "scores" / fingerprint / f"{name}.json", json.dumps(scores, indent=0) + "\n")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
