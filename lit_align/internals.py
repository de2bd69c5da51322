"""Private parts of Lightning and torch that lit-align cannot avoid: here alone, each with a test in test_internals.py.

Lightning is imported inside functions, so that rooms which do not know Lightning can use the parts of torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # torch has no public way to see every operator
from torch.utils._pytree import tree_leaves, tree_map  # the containers that operators take; torch has no public twin
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

__all__ = ["TorchDispatchMode", "tree_leaves", "tree_map"]  # the functions below are imported by name


def is_accumulating(trainer: "L.Trainer") -> bool:
    """Tell in `on_train_batch_end` whether the micro-batch took no optimizer step.

    Lightning's own monitors ask this method; counting batches would miss the shorter step at an epoch's end.
    """
    return trainer.fit_loop._should_accumulate()


def is_validation_due(trainer: "L.Trainer") -> bool:
    """Tell in `on_train_batch_end` whether Lightning will validate after this micro-batch.

    The answer depends on five options of the Trainer; Lightning decides in this method only.
    """
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    return fetcher is not None and bool(loop.epoch_loop._should_check_val_fx(fetcher))


def run_validation(trainer: "L.Trainer") -> None:
    """Validate inside `fit`, before a training step; `Trainer.validate` would end the fit."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # else a resumed loop skips the batches of the validation before
    trainer.validating = True
    loop.run()
    trainer.training = True


def replace_signal_handlers(trainer: "L.Trainer", handlers: Any) -> None:
    """Put an object with `register_signal_handlers`, `teardown` and `received_sigterm` in place of Lightning's.

    Lightning has no option against its SIGTERM handler, which broadcasts in the middle of a step.
    """
    trainer._signal_connector = handlers


def leave_fit() -> NoReturn:
    """End `Trainer.fit` normally at this point: loggers are finalized and `fit` returns.

    `should_stop` would validate first and save an unfinished epoch as finished.
    """
    from lightning.pytorch.utilities.exceptions import _TunerExitException

    raise _TunerExitException


def is_lightning_child(strategy: "Strategy") -> bool:
    """Whether Lightning itself, not SLURM or torchrun, started this process beside the first one of the machine."""
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

    launcher = strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return False
    environment = launcher.cluster_environment  # `creates_processes_externally` is always true once it has launched
    return isinstance(environment, LightningEnvironment) and environment.local_rank() != 0


class SaveSchedule(NamedTuple):
    """When a ModelCheckpoint saves."""

    every_n_train_steps: int  # 0: not by steps
    save_on_train_epoch_end: bool | None  # None: Lightning decides


def save_schedule(checkpoint: "ModelCheckpoint") -> SaveSchedule:
    """Read when a ModelCheckpoint saves; it has no public properties for these two arguments."""
    return SaveSchedule(checkpoint._every_n_train_steps, checkpoint._save_on_train_epoch_end)


def replace_link(checkpoint: "ModelCheckpoint", link: Callable[[Path, Path], None]) -> None:
    """Let a ModelCheckpoint with `save_last: link` make its link by `link(file, last)`, on the first rank.

    Its own removes the old link first, and a kill in between leaves none.
    """

    def replaced(trainer: "L.Trainer", filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            link(Path(filepath), Path(linkpath))
        trainer.strategy.barrier()

    checkpoint._link_checkpoint = replaced  # type: ignore[method-assign]


def ddp_options(strategy: "Strategy") -> dict[str, Any]:
    """Read the keyword arguments of DistributedDataParallel; empty for other strategies."""
    return dict(getattr(strategy, "_ddp_kwargs", {}))


def shard_over_all_devices(strategy: "ModelParallelStrategy", devices: int) -> None:
    """Shard over all devices of all nodes, in `setup_environment`: only then is their number known.

    Lightning's "auto" shards over nodes alone.
    """
    strategy._data_parallel_size = devices


def rewind_to_step(loops: dict[str, Any], accumulate_grad_batches: int, batches: float) -> int:
    """Count only micro-batches that an optimizer step has used; returns the number of those no longer counted.

    A checkpoint may be written in the middle of an accumulation (at a time interval, on an error). It holds no
    gradients, so the resumed run must see the pairs of the unfinished step again. Lightning would skip them.

    Args:
        loops: state of the Trainer's loops in a checkpoint; changed in place.
        accumulate_grad_batches: micro-batches per step; an epoch's last step may have fewer.
        batches: of an epoch.
    """
    loop = loops["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    current, total = progress["current"], progress["total"]
    done = current["processed"]  # a micro-batch that has only started is repeated
    unused = 0 if done >= batches else done % accumulate_grad_batches
    back = {name: current[name] - (done - unused) for name in ("ready", "started", "processed")}
    # `completed` stays one behind as before: Lightning reads from it that the batch's end was under way.
    back["completed"] = unused
    if unused and current["completed"] < done:
        # Lightning adds one when it resumes from the end of a batch that completed a step, as this one now seems to.
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    for counters in (current, total):
        for name, count in back.items():
            counters[name] -= count
    optimizer = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for span in ("total", "current"):
        steps = optimizer["step"][span]["completed"]
        optimizer["step"][span]["ready"] = steps
        optimizer["zero_grad"][span] = dict.fromkeys(optimizer["zero_grad"][span], steps)
    return unused


def unscales_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer divides gradients by the loss' scale in its own step, as fused ones do.

    They have a mark for torch's gradient scaler, which is not public.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_unscales_gradients(optimizer: torch.optim.Optimizer, unscales: bool) -> None:
    """Set the mark of `unscales_gradients` where an optimizer has it: a restored state may say another step than it."""
    if hasattr(optimizer, "_step_supports_amp_scaling"):
        optimizer._step_supports_amp_scaling = unscales


def allow_graphs(count: int) -> None:
    """Let torch.compile keep this many graphs of a function, or more if it may already; beyond them it runs uncompiled.

    Some versions take the limit as an argument; this setting has a private home in all.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, count)


def shut_down_workers(loader: DataLoader[Any]) -> None:
    """End a DataLoader's persistent workers now, even while a traceback still holds their iterator."""
    iterator: Any = loader._iterator
    if iterator is not None:
        iterator._shutdown_workers()
        loader._iterator = None


def storage_key(storage: torch.UntypedStorage) -> int:
    """The address of a storage's C++ object. `data_ptr()` is 0 for every storage on the meta device."""
    key: int = storage._cdata
    return key


def returns_nothing(operator: Any) -> bool:
    """Whether an operator's schema declares no return value; in-place kernels of bitsandbytes have none."""
    return not operator._schema.returns


def reads_a_number(operator: Any) -> bool:
    """Whether an operator is the one behind `Tensor.item()`, which meta tensors cannot answer."""
    return operator is torch.ops.aten._local_scalar_dense.default


def backward(loss: Tensor) -> None:
    """Run `loss.backward()` with active torch function modes, which it disables and a recomputation needs."""
    engine: Any = torch.autograd.Variable._execution_engine
    ones = torch.ones_like(loss)
    engine.run_backward((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def attention_kernel(name: str) -> Any:
    """One of torch's fused attention operators, to call it on meta tensors: the public function picks by device.

    Args:
        name: `flash_attention`, `flash_attention_for_cpu` or `efficient_attention`.
    """
    return getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
