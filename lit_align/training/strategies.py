"""FSDP2 and ZeRO2: training on several devices with sharded weights."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp import OptimStateKeyType as Keys
from torch.optim import Optimizer

from lit_align.backbones.loading.sharded import META, is_resumable, is_sharded, meta_weights, read_into, replace_folder
from lit_align.backbones.sharding import copy_full_
from lit_align.internals import shard_over_all_devices
from lit_align.training.checkpoints.last_link import follow
from lit_align.training.strategy_checks import refusals
from lit_align.user_errors import UserValueError


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism: each device holds a shard of weights, gradients and optimizer state.

    The weights are gathered block by block, see `shard_denoiser`; the frozen VAE and text encoders are full on each
    device. All devices must take part in each forward pass of the denoiser. Lightning's own strategy would save the
    frozen weights too, and unpickles parts of a checkpoint.

    Args:
        save_distributed_checkpoint: write a checkpoint as a folder with a part from each device, on a disk that all
            nodes share. False: as one file, as without FSDP2, gathered in the memory of the first machine.
    """

    keep_for_backward = False  # see `shard_denoiser`

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint)
        self._saves_folders = save_distributed_checkpoint
        self._path: Path | None = None  # of the checkpoint that is being loaded
        self._rounds = 0  # held-out batches of the device that has most

    def setup_environment(self) -> None:
        """Raises UserValueError if the precision is not supported, a LoRA is trained, or weights are channels_last."""
        module: Any = self.lightning_module
        backbone = module.backbone
        options = {"lora": backbone.lora is not None, "channels_last": backbone.channels_last}
        options["offload"] = backbone.activation_offload
        self._refuse(precision=self.precision_plugin.precision, **options)
        assert self.cluster_environment is not None
        shard_over_all_devices(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    def setup_optimizers(self, trainer: Any) -> None:
        """Raises UserValueError for optimizers that need full weights."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            self._refuse(optimizer=f"{type(optimizer).__module__}.{type(optimizer).__name__}")

    def _refuse(self, **options: Any) -> None:
        for refusal in refusals(type(self).__name__, **options):
            raise UserValueError(refusal)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Validate a batch. Devices with fewer batches repeat their last one, without weight, until all are done."""
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

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; a folder is written under a temporary name, and renamed when it is complete."""
        path = Path(self.broadcast(filepath))
        if not self._saves_folders:
            return super().save_checkpoint(checkpoint, path, storage_options)
        part = path.with_name(f".{path.name}.part")
        if self.is_global_zero and part.exists():
            shutil.rmtree(part)  # left by a killed run
        self.barrier()
        super().save_checkpoint(checkpoint, part, storage_options)
        self.barrier()
        if self.is_global_zero:
            replace_folder(path, part)
            follow(path, checkpoint)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint. Of a folder only shapes are read here, its tensors later into the sharded ones."""
        self._path = Path(self.broadcast(checkpoint_path))
        if not is_sharded(self._path):
            return self.checkpoint_io.load_checkpoint(self._path, weights_only=True)
        checkpoint = torch.load(self._path / META, map_location="cpu", weights_only=True)
        states: dict[str, Any] = {"optimizer_states": []} if is_resumable(checkpoint) else {}
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
                self._load_full(optimizer, checkpoint["optimizer_states"][number])

    def _load_full(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load an optimizer from one file, where weights have numbers instead of names."""
        assert self.model is not None
        named = FullyShardedDataParallel.rekey_optim_state_dict(state, Keys.PARAM_NAME, self.model)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, optimizer, named, options=options)


class ZeRO2(FSDP2):
    """FSDP2 that gathers the weights once per micro-batch instead of twice, and keeps them for the backward pass.

    Without accumulation it sends and holds as much as ZeRO's second stage (arXiv 1910.02054). Between micro-batches
    the weights are sharded again, so that accumulation gathers them once per micro-batch. For machines with enough
    memory: for SDXL 5 GB a device in bf16-mixed.
    """

    keep_for_backward = True
