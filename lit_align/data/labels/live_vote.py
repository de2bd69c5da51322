"""A vote in the training loop on the pixels of the batch, for shards without scores."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_align.data.labels.ordering import Decisions, order_pairs
from lit_align.scoring.base import Scorer
from lit_align.scoring.vote import Ballot, Vote
from lit_align.types import PreferenceBatch
from lit_align.user_errors import UserValueError


class LiveVote:
    """Orders batches by a vote of scorers.

    The scorers see the training pixels, unmirrored. If these are the stored images (no resize, no crop), the votes
    equal the votes on stored scores, apart from rounding by another batch size.

    Args:
        vote: voters and rules.
        scorers: by name; scorers that the vote does not need stay on the CPU.

    Raises:
        UserValueError: if there is no vote, a voter is missing, or the rule needs the whole data set.
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
                f"data.vote.rule {vote.rule} looks at the whole data set, not only at a batch. "
                "Run lit-align score first, and leave out data.scorers."
            )
        self.vote = vote
        self.scorers = {name: scorers[name] for name in vote.scorers}
        self.fingerprints = {name: scorer.fingerprint() for name, scorer in self.scorers.items()}

    def order(self, batch: PreferenceBatch) -> PreferenceBatch:
        """Put the chosen image of each pair first, by the vote; undecided pairs get weight 0."""
        pairs = batch.pairs
        images = torch.where(pairs.flipped.view(-1, 1, 1, 1, 1), batch.images.flip(-1), batch.images)
        differences = {name: self._difference(scorer, images, batch.prompts) for name, scorer in self.scorers.items()}
        verdict = self.vote.decide(Ballot(differences, pairs.human.cpu()))
        share, balance = verdict.vote_share.to(pairs.vote_share), verdict.balance.to(pairs.balance)
        decisions = Decisions(verdict.sign.to(pairs.human), share, balance, voted=True)
        ordered = order_pairs(batch.images, batch.time_ids, pairs, decisions)
        return PreferenceBatch(ordered.images, ordered.time_ids, batch.prompts, ordered.pairs)

    def _difference(self, scorer: Scorer, images: Tensor, prompts: list[str]) -> Tensor:
        """Score of image 0 minus score of image 1, (batch,) float64 on the CPU."""
        if scorer.device != images.device:
            scorer.prepare(images.device)
        first, second = (scorer.score(list(side), prompts).double() for side in images.unbind(1))
        return first - second

    def describe(self) -> str:
        """Describe the vote and the weights of its scorers."""
        return f"{self.vote} ({'; '.join(f'{name}: {digits}' for name, digits in self.fingerprints.items())})"
