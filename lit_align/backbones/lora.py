"""Low-rank adapters (LoRA, arXiv 2106.09685) on the denoiser, through peft."""

from dataclasses import dataclass, field

from peft import LoraConfig


@dataclass(frozen=True)
class LoRA:
    """LoRA settings; the defaults are those that MaPO's authors released.

    Args:
        rank: inner dimension of the two factors.
        alpha: scale; the adapter's output is multiplied by alpha / rank.
        target_modules: names of the denoiser's layers that get an adapter.
        dropout: share of the adapter's inputs that are zeroed in training.
    """

    rank: int = 8
    alpha: int = 8
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    dropout: float = 0.0

    def config(self) -> LoraConfig:
        """Return the peft config: first factor Gaussian, second zero, so that training starts at the base model."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules),
            init_lora_weights="gaussian",
        )
