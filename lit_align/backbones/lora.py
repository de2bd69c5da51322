"""Low-rank adapters on the denoiser (LoRA, arXiv 2106.09685), through peft."""

from dataclasses import dataclass, field

from peft import LoraConfig


@dataclass(frozen=True)
class LoRA:
    """Settings of the adapter; the default is what MaPO's authors released.

    Args:
        rank: rank of the two factors.
        alpha: the adapter's output is scaled by alpha / rank.
        target_modules: names of the denoiser's layers that get an adapter.
        dropout: share of the adapter's inputs set to zero while training.
    """

    rank: int = 8
    alpha: int = 8
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    dropout: float = 0.0

    def config(self) -> LoraConfig:
        """The same for peft: first factor Gaussian, second zero, so that training starts at the base model."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules),
            init_lora_weights="gaussian",
        )
