"""Options that several commands share: a command is a dataclass that inherits them and has a method `run`."""

from dataclasses import dataclass

from lit_align.backbones.base import Precision
from lit_align.commands.shared.process_group import ProcessGroup, join_process_group


@dataclass(kw_only=True)
class DeviceOptions:
    """Where a command computes.

    Args:
        accelerator: `auto`, `cpu` or `gpu`.
        devices: number of devices of this machine, or `auto` for all; torchrun and SLURM set it themselves.
    """

    accelerator: str = "auto"
    devices: int | str = "auto"

    def join(self, pin_threads: bool = False) -> ProcessGroup:
        """Join the processes that share the work, see `join_process_group`."""
        return join_process_group(self.accelerator, self.devices, pin_threads)


@dataclass(kw_only=True)
class SamplingOptions:
    """How images are sampled.

    Args:
        steps: of the sampler, per image.
        height: pixels; none: the size that the model was trained for.
        width: pixels; none: the size that the model was trained for.
        precision: of the UNet; none: fp16 on a GPU, fp32 on the CPU. The VAE computes in fp32.
        vae_repo: hub id or local folder of another VAE.
        variant: of the weight files in the pipeline, such as `fp16`.
    """

    steps: int = 50
    height: int | None = None
    width: int | None = None
    precision: Precision | None = None
    vae_repo: str | None = None
    variant: str | None = None
