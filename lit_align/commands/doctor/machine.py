"""The machine and the package versions that a run would have."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import lightning as L
import torch
from jsonargparse import Namespace

from lit_align.common.sizes import format_bytes
from lit_align.memory import Shares
from lit_align.training.precisions import full_spelling
from lit_align.training.strategies import FSDP2, ZeRO2
from lit_align.training.strategy_checks import name_of, refusals

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft")
SHARDING = {kind.__name__.lower(): kind.__name__ for kind in (FSDP2, ZeRO2)}


class Machine(NamedTuple):
    """Devices of a run, and how its Trainer uses them."""

    device: str  # `cpu` or `cuda`
    memory: int  # bytes per device; on the CPU a process's share of the machine's memory
    devices: int  # on all nodes
    cores: int  # CPU cores per device; 0 where unknown
    precision: str  # the Trainer's, in full spelling
    strategy: str  # short name, such as `ddp`
    bucket_view: bool = False  # whether DDP's gradients are views of its buckets

    @property
    def shares(self) -> Shares:
        return Shares.of(self.strategy, self.devices, self.bucket_view)

    def refusals(self, **options: Any) -> list[str]:
        """Explain which options the strategy does not support, see `strategy_checks.refusals`."""
        name = SHARDING.get(self.strategy)
        return [] if name is None else refusals(name, **options)


def versions(config: Namespace) -> list[str]:
    """List versions of python, of the packages that every run uses, and of the optimizer's package."""
    found = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    package = config.model.optimizer.class_path.split(".")[0]
    with suppress(PackageNotFoundError):  # the user's own module
        found[package] = version(package)
    return [", ".join(f"{name} {number}" for name, number in found.items())]


def devices() -> list[str]:
    """Describe this machine's CPU and accelerators."""
    lines = [f"cpu: {cores()} cores, {format_bytes(ram())}"]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if about.major >= 8 else "no bf16"  # since Ampere
        lines.append(f"cuda:{number}: {about.name}, {format_bytes(about.total_memory)}, {bf16}")
    if torch.backends.mps.is_available():
        lines.append("mps: shares the memory of the cpu")
    return lines


def cores() -> int:
    """Count the CPU cores that this process may use: a batch system may give it only some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0


def ram() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine_of(trainer: L.Trainer, strategy: Any) -> Machine:
    """Describe the machine that a Trainer has found.

    Args:
        trainer: Trainer of the run.
        strategy: strategy in the config's words.
    """
    cuda = trainer.strategy.root_device.type == "cuda"
    memory = torch.cuda.get_device_properties(trainer.strategy.root_device).total_memory if cuda else 0
    here = trainer.num_devices
    return Machine(
        "cpu" if trainer.strategy.root_device.type == "cpu" else "cuda",
        memory or ram() // here,
        trainer.world_size,
        cores() // here,
        str(trainer.precision),
        strategy_name(strategy, trainer.world_size),
        views_buckets(strategy),
    )


def machine_elsewhere(config: Namespace, memory: float) -> Machine:
    """Describe a machine with GPUs of `memory` GB each: as many as the config states, or one."""
    wanted = config.devices
    try:
        count = len(wanted) if isinstance(wanted, list) else max(int(wanted), 1)
    except ValueError:  # `auto`, or a list as text
        count = max(len([word for word in str(wanted).split(",") if word.strip().isdigit()]), 1)
    world, precision = count * config.num_nodes, str(config.precision)
    name, views = strategy_name(config.strategy, world), views_buckets(config.strategy)
    return Machine("cuda", int(memory * 1e9), world, 0, full_spelling(precision), name, views)


def strategy_name(strategy: Any, devices: int) -> str:
    """Return the short name of a Trainer's strategy."""
    name = name_of(strategy).removesuffix("Strategy").lower()
    return "ddp" if name == "auto" and devices > 1 else name


def views_buckets(strategy: Any) -> bool:
    """Whether a config's strategy sets `gradient_as_bucket_view`, so that DDP keeps no second copy of gradients."""
    if isinstance(strategy, str):
        return False
    parts = [strategy.get("init_args"), strategy.get("dict_kwargs")]  # dict_kwargs: for classes with **kwargs
    return any(bool(part.get("gradient_as_bucket_view")) for part in parts if part is not None)
