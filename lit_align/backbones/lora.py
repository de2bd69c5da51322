"""Low-rank adapters (LoRA, arXiv 2106.09685) on the denoiser, through peft."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

import torch
from peft import LoraConfig
from torch import nn

from lit_align.backbones.nf4 import quantize_linears
from lit_align.backbones.sharding import Denoiser
from lit_align.user_errors import UserValueError

OPTION = "model.backbone.lora"
POLICY, REFERENCE = "default", "reference"  # names of the adapters; the first is peft's own


@dataclass(frozen=True)
class LoRA:
    """LoRA settings; the defaults are those that MaPO's authors released.

    Args:
        rank: inner dimension of the two factors.
        alpha: scale; the adapter's output is multiplied by alpha / rank.
        target_modules: names of the denoiser's layers that get an adapter.
        dropout: share of the adapter's inputs that are zeroed in training.
        base: precision of the denoiser's frozen linear layers: the compute precision, or 4 bits a weight (NF4, QLoRA).
    """

    rank: int = 8
    alpha: int = 8
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    dropout: float = 0.0
    base: Literal["compute", "nf4"] = "compute"

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if value < 1:
                raise UserValueError(f"{OPTION}.{name} is {value}; it must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise UserValueError(f"{OPTION}.dropout is {self.dropout}; it must be at least 0 and less than 1.")
        if self.base not in ("compute", "nf4"):
            raise UserValueError(f"{OPTION}.base is {self.base!r}; it must be compute or nf4.")
        if not self.target_modules:
            raise UserValueError(f"{OPTION}.target_modules is empty; name at least one layer, such as to_q.")

    @property
    def scale(self) -> float:
        """Factor of the adapter's output."""
        return self.alpha / self.rank

    def config(self) -> LoraConfig:
        """Return the peft config: first factor Gaussian, second zero, so that training starts at the base model."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules),
            init_lora_weights="gaussian",
        )

    def matches(self, denoiser: Denoiser) -> dict[str, int]:
        """Count the layers that get an adapter, by the target that names them; `denoiser` has no adapter yet.

        Raises:
            UserValueError: if a target names no layer, or a part that is no single layer.
        """
        layers = {name: isinstance(module, nn.Linear | nn.Conv2d) for name, module in denoiser.named_modules()}
        found = {
            target: [name for name in layers if name == target or name.endswith(f".{target}")]  # peft's own rule
            for target in self.target_modules
        }
        known = sorted({_short(name) for name, single in layers.items() if single})
        if missing := [target for target, names in found.items() if not names]:
            raise UserValueError(f"{OPTION}.target_modules: {_unknown(missing, known)}")
        for target, names in found.items():
            if not all(layers[name] for name in names):
                raise UserValueError(
                    f"{OPTION}.target_modules: {target!r} is a part of several layers. Name layers: {', '.join(known)}."
                )
        return {target: len(names) for target, names in found.items()}

    def add_to(self, denoiser: Denoiser) -> dict[str, int]:
        """Add the adapter to a frozen denoiser, whose linear layers are first rounded if `base` says so.

        Returns:
            The number of layers with an adapter, by the target that names them.
        """
        if self.base == "nf4":
            quantize_linears(denoiser)
        layers = self.matches(denoiser)
        add_adapter(denoiser, self.config())  # peft makes its own weights trainable
        return layers


def add_adapter(denoiser: Denoiser, config: LoraConfig, name: str = POLICY) -> None:
    """Add an adapter in float32 to a denoiser in any precision.

    peft would round the new weights to the precision of their layers. So each layer shows a float32 weight that takes
    no memory meanwhile.
    """
    own = {weight: weight.data for weight in denoiser.parameters() if weight.is_floating_point()}
    for weight in own:
        weight.data = torch.zeros((), dtype=torch.float32, device=weight.device).expand(weight.shape)
    try:
        with denoiser.device:
            denoiser.add_adapter(config, name)
    finally:
        for weight, data in own.items():
            weight.data = data


def _short(name: str) -> str:
    """Return the end of a layer's name that says what it is: a number alone does not."""
    parent, _, last = name.rpartition(".")
    return f"{parent.rpartition('.')[2]}.{last}" if last.isdigit() else last


def _unknown(missing: Iterable[str], known: list[str]) -> str:
    meant = {target: get_close_matches(target, known, 1) for target in missing}
    named = ", ".join(f"{name!r}{f' (did you mean {near[0]}?)' if near else ''}" for name, near in meant.items())
    return f"the denoiser has no layer {named}. It has {', '.join(known)}."
