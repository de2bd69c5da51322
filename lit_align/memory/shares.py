"""What each device holds where a strategy spreads a model over several."""

from typing import Literal, NamedTuple, Self

from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from lit_align.backbones.sharding import Denoiser
from lit_align.memory.weight_bytes import WeightBytes

Gathered = Literal["nothing", "layers", "all"]  # of the policy's weights while it is trained; layers: those in use


class Shares(NamedTuple):
    """By how many devices something is divided, and what is whole all the same while a step goes on.

    Gradients of the layers in use, on their way to their devices, are not counted.
    """

    parameters: int = 1
    gradients: int = 1
    optimizer: int = 1
    copies: int = 0  # of the gradients, in buckets
    gathered: Gathered = "nothing"
    known: bool = True  # whether the strategy is

    @classmethod
    def of(cls, strategy: str, devices: int, bucket_view: bool = False) -> Self:
        """Those of a Trainer's strategy.

        Args:
            strategy: by its short name.
            devices: in all.
            bucket_view: DDP's `gradient_as_bucket_view`: the gradients are in its buckets, not beside them.
        """
        if devices == 1 or strategy in ("auto", "single_device"):
            return cls()
        if strategy.startswith("ddp"):
            return cls(copies=0 if bucket_view else 1)
        if strategy in ("fsdp2", "zero2"):
            return cls(devices, devices, devices, gathered="all" if strategy == "zero2" else "layers")
        return cls(known=False)

    def of_weights(self, weights: WeightBytes) -> WeightBytes:
        """A device's part. Encoders are whole everywhere: they load after the strategy has spread the module."""
        trained, frozen, reference = (part // self.parameters for part in weights[:3])
        return WeightBytes(trained, frozen, reference, weights.encoders, weights.gradients // self.gradients)

    def of_optimizer(self, state: int) -> int:
        return state // self.optimizer

    def buckets(self, weights: WeightBytes) -> int:
        return self.copies * weights.gradients

    def of_policy(self, denoiser: Denoiser) -> int:
        """Weights that are whole at a time while the policy is trained, their number."""
        if self.gathered == "all":
            return sum(weight.numel() for weight in denoiser.parameters())
        return self.of_reference(denoiser)

    def of_reference(self, denoiser: Denoiser) -> int:
        """Weights that are whole at a time while a denoiser predicts, their number."""
        return 0 if self.gathered == "nothing" else layers_in_use(denoiser)


def layers_in_use(denoiser: Denoiser) -> int:
    """How many weights of a UNet FSDP2 gathers at a time at most.

    The parts are those of `shard_denoiser`: each has the weights that no part within it has. A transformer is in use
    within its block, and a block within the UNet, whose own few layers stay for all of a forward pass.
    """
    blocks = [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]
    return max(_block_in_use(block) for block in blocks) + _count(denoiser) - sum(map(_count, blocks))


def _block_in_use(block: nn.Module) -> int:
    transformers = [_count(module) for module in block.modules() if isinstance(module, BasicTransformerBlock)]
    return _count(block) - sum(transformers) + max(transformers, default=0)


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
