"""Share of weights, gradients and optimizer state that each device holds under a strategy."""

from typing import Literal, NamedTuple, Self

from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from lit_align.backbones.sharding import Denoiser
from lit_align.memory.weight_bytes import WeightBytes

Gathered = Literal["nothing", "layers", "all"]  # full weights of the policy while it trains


class Shares(NamedTuple):
    """Number of devices that share memory, and the weights that are gathered during a step.

    Gradients of layers in use, before they are reduced to their devices, are not counted.
    """

    parameters: int = 1  # divisor
    gradients: int = 1  # divisor
    optimizer: int = 1  # divisor
    copies: int = 0  # of the gradients, in DDP's buckets
    gathered: Gathered = "nothing"
    known: bool = True  # False for a strategy whose sharding is unknown

    @classmethod
    def of(cls, strategy: str, devices: int, bucket_view: bool = False) -> Self:
        """Return the shares under a Trainer's strategy.

        Args:
            strategy: short name, such as `ddp`.
            devices: number of devices on all nodes.
            bucket_view: DDP's `gradient_as_bucket_view`: gradients are views of its buckets, not copies.
        """
        if devices == 1 or strategy in ("auto", "single_device"):
            return cls()
        if strategy.startswith("ddp"):
            return cls(copies=0 if bucket_view else 1)
        if strategy in ("fsdp2", "zero2"):
            return cls(devices, devices, devices, gathered="all" if strategy == "zero2" else "layers")
        return cls(known=False)

    def of_weights(self, weights: WeightBytes) -> WeightBytes:
        """Divide weights. Encoders stay whole on each device: they load after the strategy has sharded the module."""
        trained, frozen, reference = (part // self.parameters for part in weights[:3])
        return WeightBytes(trained, frozen, reference, weights.encoders, weights.gradients // self.gradients)

    def of_optimizer(self, state: int) -> int:
        """Divide bytes of optimizer state."""
        return state // self.optimizer

    def buckets(self, weights: WeightBytes) -> int:
        """Bytes of DDP's buckets beside the gradients."""
        return self.copies * weights.gradients

    def of_policy(self, denoiser: Denoiser) -> int:
        """Count the weights that are gathered at a time while the policy trains."""
        if self.gathered == "all":
            return sum(weight.numel() for weight in denoiser.parameters())
        return self.of_reference(denoiser)

    def of_reference(self, denoiser: Denoiser) -> int:
        """Count the weights that are gathered at a time while a denoiser predicts."""
        return 0 if self.gathered == "nothing" else layers_in_use(denoiser)


def layers_in_use(denoiser: Denoiser) -> int:
    """Count the most weights of a UNet that FSDP2 gathers at a time.

    The parts are those of `shard_denoiser`, without the parts inside them. While a transformer is in use, so are its
    block's own layers, and the UNet's own few layers during the whole forward pass.
    """
    blocks = [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]
    return max(_block_in_use(block) for block in blocks) + _count(denoiser) - sum(map(_count, blocks))


def _block_in_use(block: nn.Module) -> int:
    transformers = [_count(module) for module in block.modules() if isinstance(module, BasicTransformerBlock)]
    return _count(block) - sum(transformers) + max(transformers, default=0)


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
