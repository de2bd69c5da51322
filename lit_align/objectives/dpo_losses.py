"""Losses of the DPO family: functions of x, the logit of the preference, which is 0 at the reference."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossType = Literal["sigmoid", "hinge", "ipo", "dmpo", "linear"]
WRONG = 0.01  # dmpo's share of wrong labels: its optimum is x = logit(1 - WRONG) = 4.6
LOG_RIGHT, LOG_WRONG = (torch.tensor(share, dtype=torch.float64).log().item() for share in (1 - WRONG, WRONG))
FLOOR = 1e-3  # least slope of the linear loss; the greatest is 1 less
EDGE = (0.5 - FLOOR) / 0.4  # of x, where the slope of the linear loss stops to change


def soft_sigmoid(x: Tensor, right: Tensor) -> Tensor:
    """-q logsigmoid(x) - (1 - q) logsigmoid(-x), where q is the probability `right` that the label is right.

    Its gradient is sigmoid(x) - q, its optimum logit(q) (cDPO, Mitchell 2023).
    """
    return -right * F.logsigmoid(x) - (1 - right) * F.logsigmoid(-x)


def dmpo(x: Tensor) -> Tensor:
    """Divergence of the policy's preference from that of labels of which a share `WRONG` is wrong.

    KL(Bernoulli(sigmoid(x)) || Bernoulli(1 - WRONG)) (Diffusion-SDPO's train.py, DMPO; TRL's exo_pair). Its gradient,
    sigmoid(x) sigmoid(-x) (x - logit(1 - WRONG)), vanishes for large |x|.
    """
    for_, against = torch.sigmoid(x), torch.sigmoid(-x)
    return for_ * (F.logsigmoid(x) - LOG_RIGHT) + against * (F.logsigmoid(-x) - LOG_WRONG)


def linear(x: Tensor) -> Tensor:
    """Potential of the slope -clamp(0.5 - 0.4 x, FLOOR, 1 - FLOOR) (Linear-DPO's train_sd_dpo.py, times beta / 2).

    A hinge with a smooth knee, about 0 where x is beyond 1.25.
    """
    inner = x.clamp(-EDGE, EDGE)
    return 0.2 * inner.square() - 0.5 * inner + 0.3125 - FLOOR * (x - EDGE).relu() + (1 - FLOOR) * (-EDGE - x).relu()


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda x: -F.logsigmoid(x),
    "hinge": lambda x: torch.relu(1 - x),
    "ipo": lambda x: (x - 0.5).square(),
    "dmpo": dmpo,
    "linear": linear,
}
FORMULAS = {
    "sigmoid": "-logsigmoid(inside)",
    "hinge": "relu(1 - inside)",
    "ipo": "(inside - 1/2)^2",
    "dmpo": f"KL(Bernoulli(sigmoid(inside)) || Bernoulli({1 - WRONG:g}))",
    "linear": f"h(inside), h' = -clamp(0.5 - 0.4 inside, {FLOOR:g}, {1 - FLOOR:g})",
}
