"""The chosen image comes first, whoever decided."""

import torch

from lit_align.data.labels.ordering import Decisions, order_pairs
from lit_align.types import PairInfo


def test_images_sizes_and_labels_follow_the_decision():
    images = torch.arange(3 * 2 * 4).view(3, 2, 4)
    time_ids = torch.arange(3 * 2 * 6).view(3, 2, 6)
    info = PairInfo(
        numbers=[7, 8, 9],
        weight=torch.tensor([1.0, 1.0, 1.0]),
        flipped=torch.tensor([False, True, False]),
        human=torch.tensor([1, 1, -1]),  # image 0, image 0, image 1
        vote_share=torch.zeros(3),
        balance=torch.zeros(3),
        voted=False,
        faults=("one",),
    )
    decisions = Decisions(torch.tensor([1, -1, 0]), torch.tensor([0.75, 1.0, 0.0]), torch.tensor([0.5, 1.0, 0.0]), True)
    ordered_images, ordered_ids, pairs = order_pairs(images, time_ids, info, decisions)
    assert torch.equal(ordered_images, torch.stack([images[0], images[1].flip(0), images[2]]))
    assert torch.equal(ordered_ids, torch.stack([time_ids[0], time_ids[1].flip(0), time_ids[2]]))
    assert pairs.human.tolist() == [1, -1, -1]  # the second vote contradicts its label
    assert pairs.weight.tolist() == [1, 1, 0]
    assert pairs.vote_share.tolist() == [0.75, 1, 0]
    assert pairs.balance.tolist() == [0.5, 1, 0]
    assert pairs.voted
    assert pairs.numbers == [7, 8, 9]
    assert pairs.flipped.tolist() == [False, True, False]
    assert pairs.faults == ("one",)
