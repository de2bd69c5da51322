"""A vote in the training loop, on the pixels of the batch, where the shards have no scores."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_align.scoring.base import Scorer
from lit_align.scoring.vote import Ballot, Vote
from lit_align.types import PreferenceBatch
from lit_align.user_errors import UserValueError


class LiveVote:
    """Orders batches by the votes of scorers.

    The scorers see the pixels that train, unmirrored. Where those are the stored images (no resize, no crop) the votes
    are those of `lit-align score`, apart from the rounding of another batch size.

    Args:
        vote: voters and rules; none is an error.
        scorers: by name; those that the vote does not need stay on the CPU.
    """

    def __init__(self, vote: Vote | None, scorers: Mapping[str, Scorer]) -> None:
        if vote is None:
            raise UserValueError("data.scorers is set, but data.vote is not. Say in data.vote how the scorers vote.")
        missing = [name for name in vote.scorers if name not in scorers]
        if missing:
            raise UserValueError(
                f"data.scorers lacks {missing[0]!r}, which data.vote names; it has {', '.join(scorers)}."
            )
        if vote.needs_data_set:
            raise UserValueError(
                f"data.vote.rule {vote.rule} looks at the whole data set, which a batch is not. "
                "Run lit-align score first and leave data.scorers out."
            )
        self.vote = vote
        self.scorers = {name: scorers[name] for name in vote.scorers}
        self.fingerprints = {name: scorer.fingerprint() for name, scorer in self.scorers.items()}

    def order(self, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch, ordered by the vote; undecided pairs get no weight."""
        mirrored = batch.flipped[:, None, None, None]
        images = [torch.where(mirrored, side.flip(-1), side) for side in (batch.chosen, batch.rejected)]
        differences = {name: self._difference(scorer, images, batch.prompts) for name, scorer in self.scorers.items()}
        verdict = self.vote.decide(Ballot(differences, batch.human.cpu()))
        sign, strength = verdict.sign.to(batch.human), verdict.strength.to(batch.strength)
        swap = sign < 0
        chosen, rejected = _swap(swap, batch.chosen, batch.rejected)
        chosen_geometry, rejected_geometry = _swap(swap, batch.chosen_geometry, batch.rejected_geometry)
        return batch._replace(
            chosen=chosen,
            rejected=rejected,
            chosen_geometry=chosen_geometry,
            rejected_geometry=rejected_geometry,
            weight=batch.weight * (sign != 0),
            human=torch.where(swap, -batch.human, batch.human),
            voted=True,
            strength=strength,
        )

    def _difference(self, scorer: Scorer, images: list[Tensor], prompts: list[str]) -> Tensor:
        """(batch,) float64 on the CPU."""
        if scorer.device != images[0].device:
            scorer.prepare(images[0].device)
        first, second = (scorer.score(list(side), prompts).double() for side in images)
        return first - second

    def describe(self) -> str:
        return f"{self.vote} ({'; '.join(f'{name}: {digits}' for name, digits in self.fingerprints.items())})"


def _swap(where: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both, exchanged in the rows where `where` (batch,) is true."""
    where = where.view(-1, *[1] * (first.ndim - 1))
    return torch.where(where, second, first), torch.where(where, first, second)
