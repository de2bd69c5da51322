"""Training on several devices with the weights shared out among them."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp import OptimStateKeyType as Keys
from torch.optim import Optimizer

from lit_align.backbones.loading.sharded import (
    META,
    is_resumable,
    is_sharded,
    meta_weights,
    read_into,
    replace_folder,
)
from lit_align.backbones.sharding import copy_full_
from lit_align.user_errors import UserValueError

REFUSED = ("deepspeed", "fsdp", "modelparallel")  # what their names begin with
SUPPORTED = ("32-true", "bf16-mixed")


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism: each device holds its part of weights, gradients and optimizer state.

    The weights are gathered block by block, see `shard_denoiser`; the frozen VAE and text encoders are whole on each
    device. All devices must take part in each forward pass of the denoiser. Lightning's own strategy would want the
    frozen weights in the checkpoint too, and unpickle parts of it.

    Args:
        save_distributed_checkpoint: a checkpoint is a folder to which each device writes its part, on a disk that all
            nodes share; otherwise one file, like that of any other run, for which the first device's machine gathers
            all of it.
    """

    keep_for_backward = False  # see `shard_denoiser`

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint)
        self._path: Path | None = None  # of the checkpoint that is being loaded
        self._rounds = 0  # held-out batches of the device that has most

    def setup_environment(self) -> None:
        """Raises ValueError where the precision is not supported, or where a LoRA is trained."""
        module: Any = self.lightning_module
        self._refuse(precision=self.precision_plugin.precision, lora=module.backbone.lora is not None)
        assert self.cluster_environment is not None
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup_optimizers(self, trainer: Any) -> None:
        """Raises ValueError for optimizers that work on whole weights alone."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            self._refuse(optimizer=f"{type(optimizer).__module__}.{type(optimizer).__name__}")

    def _refuse(self, **options: Any) -> None:
        for refusal in refusals(type(self).__name__, **options):
            raise UserValueError(refusal)

    # -- validation

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Devices that have no more held-out batches repeat their last one, without weight, while others go on."""
        result = super().validation_step(*args, **kwargs)
        batch, number = args[:2]
        batches = self._held_out_batches()
        if number == 0:
            self._rounds = int(self.reduce(torch.tensor(batches, device=self.root_device), reduce_op="max"))
        if number == batches - 1:
            for _ in range(self._rounds - batches):
                nothing = batch._replace(pairs=batch.pairs._replace(weight=torch.zeros_like(batch.pairs.weight)))
                super().validation_step(nothing, number, *args[2:], **kwargs)
        return result

    def _held_out_batches(self) -> int:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        (count,) = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        return int(count)

    # -- checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """A folder is written beside the place that it will have, and moved there once it is whole."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            return super().save_checkpoint(checkpoint, path, storage_options)
        part = path.with_name(f".{path.name}.part")
        if self.is_global_zero and part.exists():
            shutil.rmtree(part)  # left over by a killed run
        self.barrier()
        super().save_checkpoint(checkpoint, part, storage_options)
        self.barrier()
        if self.is_global_zero:
            replace_folder(path, part)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """All but the values of a folder's weights and optimizer: they are read once the module has said what fits."""
        self._path = Path(self.broadcast(checkpoint_path))
        if not is_sharded(self._path):
            return self.checkpoint_io.load_checkpoint(self._path, weights_only=True)
        checkpoint = torch.load(self._path / META, map_location="cpu", weights_only=True)
        states: dict[str, Any] = (
            {"optimizer_states": []} if is_resumable(checkpoint) else {}
        )  # their values are read later
        return checkpoint | {"state_dict": meta_weights(self._path)} | states

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        assert self._path is not None
        found: Mapping[str, Tensor] = checkpoint["state_dict"]
        own = {name: weight for name, weight in self.lightning_module.state_dict().items() if name in found}
        if is_sharded(self._path):
            read_into({"state_dict": own}, self._path)
        else:
            for name, weight in own.items():
                copy_full_(weight, found[name])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        assert self._path is not None
        for number, optimizer in enumerate(self.optimizers):
            if is_sharded(self._path):
                state = {f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)}
                read_into(state, self._path)
                set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{number}"])
            else:
                self._load_whole(optimizer, checkpoint["optimizer_states"][number])

    def _load_whole(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """From one file, where weights have numbers in place of names."""
        assert self.model is not None
        named = FullyShardedDataParallel.rekey_optim_state_dict(state, Keys.PARAM_NAME, self.model)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, optimizer, named, options=options)


class ZeRO2(FSDP2):
    """FSDP2 that gathers the weights once a micro-batch instead of twice, and holds them until the backward pass ends.

    Without accumulation as much is sent as by ZeRO's second stage (arXiv 1910.02054), and as much is held while a step
    goes on; between micro-batches the weights are shared out too, so that accumulating sends them anew for each. For
    machines that have the memory: for SDXL 5 GB a device in bf16-mixed.
    """

    keep_for_backward = True


def refusals(
    strategy: str, precision: str | None = None, optimizer: str | None = None, lora: bool = False
) -> list[str]:
    """What FSDP2 and ZeRO2 do not train with, each with what to set instead.

    Args:
        strategy: by its name, for the words.
        precision: of the Trainer, in its full spelling; None: not looked at.
        optimizer: class, by its import path; None: not looked at.
        lora: whether an adapter is trained.
    """
    found = []
    if precision is not None and precision not in SUPPORTED:
        found.append(
            f"trainer.precision is {precision}, but {strategy} is for {' and '.join(SUPPORTED)}: the weights that are "
            "shared out stay in float32. Set one of these, or trainer.strategy to ddp."
        )
    if optimizer is not None and not optimizer.startswith("torch.optim."):
        found.append(
            f"model.optimizer is {optimizer}, but {strategy} is for the optimizers of torch: others do not know "
            "weights that are shared out. Set model.optimizer to torch.optim.AdamW, or trainer.strategy to ddp."
        )
    if lora:
        found.append(
            f"model.backbone.lora is set, but {strategy} shares the weights of a whole denoiser out: its frozen "
            "weights cannot be in the compute precision there. A LoRA needs little memory: set trainer.strategy to ddp."
        )
    return found


INSTEAD = (
    "set it to lit_align.training.strategies.FSDP2 (configs/hardware/fsdp2_multi_node.yaml), which shards weights, "
    "gradients and optimizer state, to lit_align.training.strategies.ZeRO2 (configs/hardware/zero2_8x80gb.yaml), or to "
    "ddp."
)


def name_of(strategy: Any) -> str:
    """The name of a strategy in a config: a word, an import path, or a class with its arguments."""
    name = strategy if isinstance(strategy, str) else str(strategy.class_path)
    return name.split(".")[-1]


def check_strategy(strategy: Strategy | str) -> None:
    """Refuse strategies that share weights or optimizer state out in another way than FSDP2.

    DeepSpeed takes the gradients away before their norm is known, on which clipping and `model.non_finite` rest, rounds
    the VAE, and writes checkpoints without what `on_save_checkpoint` gives and takes. FSDP's first version hides the
    weights in flat ones without their names; Lightning's ModelParallelStrategy wants frozen weights in checkpoints too.

    Args:
        strategy: or its name in a config, which is refused before its package is missed.

    Raises:
        ValueError: that names what to set instead.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if name != FSDP2.__name__ and name.lower().startswith(REFUSED):
        raise UserValueError(f"trainer.strategy is {name}, with which lit-align does not train; {INSTEAD}")
