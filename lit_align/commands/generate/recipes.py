"""Recipe of self-generated pairs: how the two sides differ, and the seeds of each pair."""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lit_align.user_errors import UserValueError

SIDES = ("chosen", "rejected")
PresetName = Literal["pick-style-cartoon", "pick-style-pixel-art", "pick-safety"]


class Prefixes(NamedTuple):
    """Prompt prefixes of a published data set; None if unknown."""

    chosen: str | None
    rejected: str | None


# Dataset cards of mapo-t2i/pick-style-cartoon, pick-style-pixel-art and pick-safety (arXiv 2406.06424). The rejected
# image of the two styles is drawn from the plain prompt there; the project's page says "Realistic 8k image." instead.
PRESETS: dict[PresetName, Prefixes] = {
    "pick-style-cartoon": Prefixes("Disney style animated image.", ""),
    "pick-style-pixel-art": Prefixes("Pixel art style image.", ""),
    "pick-safety": Prefixes("", None),
}


@dataclass(frozen=True)
class Side:
    """Settings by which one image of a pair is generated."""

    prefix: str
    repo: str
    unet: str | None  # folder or file that takes the place of the UNet in `repo`, or is a LoRA on it
    guidance_scale: float

    def prompt(self, plain: str) -> str:
        """The prompt that the model is given."""
        return f"{self.prefix} {plain}" if self.prefix else plain


@dataclass(frozen=True)
class Recipe:
    """Both sides, and who says which image is preferred.

    Args:
        chosen: the side whose image is preferred, if nobody ranks.
        rejected: the other one.
        same_noise: both images start from the same noise.
        rank_by: name of a scorer that decides in place of the sides.

    Raises:
        ValueError: if nothing tells the sides apart.
    """

    chosen: Side
    rejected: Side
    same_noise: bool
    rank_by: str | None

    def __post_init__(self) -> None:
        if self.chosen == self.rejected and self.rank_by is None:
            raise UserValueError(
                "Nothing tells the chosen side from the rejected one. Give one of them another prefix, guidance_scale, "
                "unet or repo (such as --chosen_prefix 'Pixel art style image.'), or a scorer to --rank_by."
            )
        if self.chosen == self.rejected and self.same_noise:
            raise UserValueError("same_noise is true and the sides are alike: both images of a pair would be the same.")

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.chosen, self.rejected


def choose_prefixes(preset: PresetName | None, chosen: str | None, rejected: str | None) -> tuple[str, str]:
    """Both prefixes: those that are given, else the preset's, else none.

    Raises:
        ValueError: if the preset has none to give.
    """
    known = Prefixes("", "") if preset is None else PRESETS[preset]
    prefixes = (known.chosen if chosen is None else chosen), (known.rejected if rejected is None else rejected)
    for side, prefix in zip(SIDES, prefixes, strict=True):
        if prefix is None:
            raise UserValueError(
                f"preset {preset}: the prefix of its {side} images is unknown here. Say it with --{side}_prefix."
            )
    return prefixes[0] or "", prefixes[1] or ""


class PairSeeds(NamedTuple):
    """Random part of a pair."""

    seeds: tuple[int, int]  # of the noise: chosen side, rejected side
    rejected_first: bool  # whether the rejected side's image is image 0


def pair_seeds(prompt: str, seed: int, pair: int, same_noise: bool) -> PairSeeds:
    """The draw of a prompt's pair: a hash, so that neither the file around it nor who draws it matters.

    The recipe is no part of it: two recipes with one seed draw from the same noise.

    Args:
        prompt: without prefix.
        seed: of the run.
        pair: number among the prompt's pairs.
        same_noise: see `Recipe`.
    """
    digest = hashlib.blake2b(json.dumps([prompt, seed, pair]).encode(), digest_size=9).digest()
    chosen, rejected = (int.from_bytes(digest[i : i + 4], "big") for i in (0, 4))  # torch's CPU generator uses 32 bits
    if same_noise:
        rejected = chosen
    elif rejected == chosen:
        rejected ^= 1
    return PairSeeds((chosen, rejected), bool(digest[8] & 1))
