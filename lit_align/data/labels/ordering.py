"""The one place where the chosen image of a pair comes first: for human labels, stored votes and live votes."""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.types import PairInfo


class Decisions(NamedTuple):
    """Which image of each pair is chosen, and who decided."""

    sign: Tensor  # (batch,) int64: 1: image 0 is chosen, -1: image 1 is, 0 if undecided
    vote_share: Tensor  # (batch,) float32, see `PairInfo`
    balance: Tensor  # (batch,) float32, see `PairInfo`
    voted: bool


class OrderedPairs(NamedTuple):
    """Pairs whose chosen image comes first."""

    images: Tensor  # (batch, 2, ...)
    time_ids: Tensor  # (batch, 2, 6)
    pairs: PairInfo


def order_pairs(images: Tensor, time_ids: Tensor, pairs: PairInfo, decisions: Decisions) -> OrderedPairs:
    """Put the chosen image of each pair first; an undecided pair keeps its order and gets weight 0.

    Args:
        images: (batch, 2, ...) image 0 and image 1 as the shard has them.
        time_ids: (batch, 2, 6) of these images.
        pairs: `human` is 1 where the human label prefers image 0.
        decisions: on these pairs.
    """
    swapped = decisions.sign < 0
    rows = torch.arange(len(swapped), device=swapped.device)[:, None]
    order = torch.stack([swapped, ~swapped], 1).long()  # (batch, 2) numbers of the images
    info = pairs._replace(
        weight=pairs.weight * (decisions.sign != 0),
        human=torch.where(swapped, -pairs.human, pairs.human),
        vote_share=decisions.vote_share,
        balance=decisions.balance,
        voted=decisions.voted,
    )
    return OrderedPairs(images[rows, order], time_ids[rows, order], info)
