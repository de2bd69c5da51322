"""What each device holds where a strategy spreads a model over several."""

from typing import NamedTuple, Self

from lit_align.memory.weights import WeightBytes


class Shares(NamedTuple):
    """By how many devices something is divided.

    What FSDP2 gathers for a while, the layers in use, is not counted; all that ZeRO2 gathers is.
    """

    parameters: int = 1
    gradients: int = 1
    optimizer: int = 1
    copies: int = 0  # of the gradients, in buckets
    gathered: bool = False  # whether all trained weights are whole while a step goes on
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
            return cls(devices, devices, devices, gathered=strategy == "zero2")
        return cls(known=False)

    def of_weights(self, weights: WeightBytes) -> WeightBytes:
        """A device's part. Encoders are whole everywhere: they load after the strategy has spread the module."""
        trained, frozen, reference = (part // self.parameters for part in weights[:3])
        return WeightBytes(trained, frozen, reference, weights.encoders, weights.gradients // self.gradients)

    def of_optimizer(self, state: int) -> int:
        return state // self.optimizer

    def buckets(self, weights: WeightBytes) -> int:
        return self.copies * weights.gradients
