"""Which process this is among those that share a piece of work, and where it computes."""

from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment


class Place(NamedTuple):
    """Which process this is, and where it computes."""

    rank: int
    world_size: int
    device: torch.device

    def __str__(self) -> str:
        return f"process {self.rank + 1} of {self.world_size}, {self.device}"


def take_place(accelerator: str, devices: int | str) -> Place:
    """This process's place among those that torchrun or SLURM has started, or that Fabric starts here.

    The processes need no process group: they only share out the shards.
    """
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            found = environment()
            # A task may see all GPUs of its machine, or its own alone.
            visible = torch.cuda.device_count() if accelerator != "cpu" else 0
            one: Any = [found.local_rank() % visible] if visible else 1
            fabric = Fabric(accelerator=accelerator, devices=one, plugins=[LightningEnvironment()])
            return Place(found.global_rank(), found.world_size(), fabric.device)
    fabric = Fabric(accelerator=accelerator, devices=devices)
    fabric.launch()
    return Place(fabric.global_rank, fabric.world_size, fabric.device)
