"""The machine that a run would have, and the versions that it would run with."""

import os
import platform
from importlib.metadata import version
from typing import Any, NamedTuple

import lightning as L
import torch
from jsonargparse import Namespace

from lit_align.commands.diagnosis import gigabytes
from lit_align.fsdp2 import name_of
from lit_align.memory import Shares

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft")
SPELLINGS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true", "None": "32-true"}


class Machine(NamedTuple):
    """What each device is, and how many there are."""

    device: str  # `cpu` or `cuda`
    memory: int  # bytes of one device; on the CPU its share of the machine's
    devices: int  # in all
    cores: int  # of the CPU, for each device of a node; 0 where they are not known
    precision: str  # of the Trainer, in its full spelling
    strategy: str  # by its short name

    @property
    def shares(self) -> Shares:
        return Shares.of(self.strategy, self.devices)


def versions(config: Namespace) -> list[str]:
    """Versions of python, of what every run uses, and of the package that the optimizer comes from."""
    package = config.model.optimizer.class_path.split(".")[0]
    names = [*PACKAGES, *({package} - set(PACKAGES))]
    return [", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])]


def devices() -> list[str]:
    """What this machine has."""
    lines = [f"cpu: {os.cpu_count()} cores, {gigabytes(ram())}"]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if about.major >= 8 else "no bf16"  # Ampere was the first
        lines.append(f"cuda:{number}: {about.name}, {gigabytes(about.total_memory)}, {bf16}")
    if torch.backends.mps.is_available():
        lines.append("mps: shares the memory of the cpu")
    return lines


def ram() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine_of(trainer: L.Trainer, strategy: Any) -> Machine:
    """The machine that a Trainer has found.

    Args:
        trainer: as a run has it.
        strategy: as the config names it.
    """
    cuda = trainer.strategy.root_device.type == "cuda"
    memory = torch.cuda.get_device_properties(trainer.strategy.root_device).total_memory if cuda else 0
    here = trainer.num_devices
    return Machine(
        "cpu" if trainer.strategy.root_device.type == "cpu" else "cuda",
        memory or ram() // here,
        trainer.world_size,
        (os.cpu_count() or 0) // here,
        str(trainer.precision),
        strategy_name(strategy, trainer.world_size),
    )


def machine_elsewhere(config: Namespace, memory: float) -> Machine:
    """A machine with GPUs of `memory` GB each, as many as the config asks for by number, else one."""
    wanted = config.devices
    try:
        count = len(wanted) if isinstance(wanted, list) else max(int(wanted), 1)
    except ValueError:  # auto, or a list in words
        count = max(len([word for word in str(wanted).split(",") if word.strip().isdigit()]), 1)
    world, precision = count * config.num_nodes, str(config.precision)
    name = strategy_name(config.strategy, world)
    return Machine("cuda", int(memory * 1e9), world, 0, SPELLINGS.get(precision, precision), name)


def strategy_name(strategy: Any, devices: int) -> str:
    """The short name of a Trainer's strategy."""
    name = name_of(strategy).removesuffix("Strategy").lower()
    return "ddp" if name == "auto" and devices > 1 else name
