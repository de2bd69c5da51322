"""Refuse strategies of the Trainer that lit-align does not support, and say what to set instead."""

from typing import Any

from lightning.pytorch.strategies import Strategy

from lit_align.user_errors import UserValueError

REFUSED = ("deepspeed", "fsdp", "modelparallel")  # beginnings of strategies' names
SUPPORTED = ("32-true", "bf16-mixed")
INSTEAD = (
    "set it to lit_align.training.strategies.FSDP2 (configs/hardware/fsdp2_multi_node.yaml), which shards weights, "
    "gradients and optimizer state, to lit_align.training.strategies.ZeRO2 (configs/hardware/zero2_8x80gb.yaml), or to "
    "ddp."
)


def name_of(strategy: Any) -> str:
    """Return the name of a strategy in a config: a word, an import path, or a class with its arguments."""
    name = strategy if isinstance(strategy, str) else str(strategy.class_path)
    return name.split(".")[-1]


def check_strategy(strategy: Strategy | str) -> None:
    """Refuse strategies that shard weights or optimizer state in another way than FSDP2.

    DeepSpeed takes the gradients away before their norm is known, which clipping and `model.non_finite` need, rounds
    the VAE, and writes checkpoints without what `on_save_checkpoint` adds. FSDP's first version replaces the weights by
    flat ones without names. Lightning's ModelParallelStrategy saves and loads frozen weights too.

    Args:
        strategy: or its name in a config; a name is refused even if the strategy's package is not installed.

    Raises:
        UserValueError: that names what to set instead.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if name != "FSDP2" and name.lower().startswith(REFUSED):
        raise UserValueError(f"trainer.strategy is {name}, with which lit-align does not train; {INSTEAD}")


def refusals(
    strategy: str,
    precision: str | None = None,
    optimizer: str | None = None,
    lora: bool = False,
    channels_last: bool = False,
    offload: bool = False,
) -> list[str]:
    """List the settings that FSDP2 and ZeRO2 do not train with, each with what to set instead.

    Args:
        strategy: its name, for the messages.
        precision: of the Trainer, in its full spelling; None is not checked.
        optimizer: import path of its class; None is not checked.
        lora: whether an adapter is trained.
        channels_last: whether weights of convolutions are in this order.
        offload: whether activations wait in main memory.
    """
    found = []
    if precision is not None and precision not in SUPPORTED:
        found.append(
            f"trainer.precision is {precision}, but {strategy} supports {' and '.join(SUPPORTED)}: sharded weights "
            "stay in float32. Set one of these, or trainer.strategy to ddp."
        )
    if optimizer is not None and not optimizer.startswith("torch.optim."):
        found.append(
            f"model.optimizer is {optimizer}, but {strategy} supports the optimizers of torch: others do not know "
            "sharded weights. Set model.optimizer to torch.optim.AdamW, or trainer.strategy to ddp."
        )
    if lora:
        found.append(
            f"model.backbone.lora is set, but {strategy} shards a full denoiser, whose frozen weights cannot be in the "
            "compute precision. A LoRA needs little memory: set trainer.strategy to ddp."
        )
    if channels_last:
        found.append(
            f"model.backbone.channels_last is true, but {strategy} shards weights, which torch does with contiguous "
            "ones only. Set it to false."
        )
    if offload:
        found.append(
            f"model.backbone.activation_offload is true, but {strategy} gathers weights for each block, which would "
            "move to main memory as activations do. Set it to false."
        )
    return found
