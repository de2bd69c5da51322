"""Options that several commands share: a command is a dataclass that inherits them and has a method `run`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_align.common.choices import Precision

if TYPE_CHECKING:  # methods import what they need, so that --help imports no torch
    import torch

    from lit_align.commands.shared.models import Sampling
    from lit_align.commands.shared.process_group import ProcessGroup


@dataclass(kw_only=True)
class DeviceOptions:
    """Options of the device that a command computes on.

    Args:
        accelerator: `auto`, `cpu` or `gpu`.
        devices: number of devices of this machine, or `auto` for all; torchrun and SLURM set it themselves.
    """

    accelerator: str = "auto"
    devices: int | str = "auto"

    def join(self, pin_threads: bool = False) -> "ProcessGroup":
        """Join the processes that share the work, see `join_process_group`."""
        from lit_align.commands.shared.process_group import join_process_group

        return join_process_group(self.accelerator, self.devices, pin_threads)


@dataclass(kw_only=True)
class SamplingOptions:
    """Options of image sampling.

    Args:
        steps: of the sampler, per image.
        guidance_scale: of classifier-free guidance, 1 turns it off; none: 5 for SDXL, 7.5 for Stable Diffusion.
        height: pixels; none: the size that the model was trained for.
        width: pixels; none: the size that the model was trained for.
        precision: of the UNet; none: fp16 on a GPU, fp32 on the CPU. The VAE computes in fp32.
        vae_repo: hub id or local folder of another VAE.
        variant: of the weight files in the pipeline, such as `fp16`.
    """

    steps: int = 50
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    precision: Precision | None = None
    vae_repo: str | None = None
    variant: str | None = None

    def check_numbers(self, **counts: int) -> None:
        """Raise a ValueError that names an option with an impossible number.

        Args:
            counts: options beside `steps` that must be at least 1.
        """
        from lit_align.commands.shared.models import check_numbers

        check_numbers(counts | {"steps": self.steps}, {"height": self.height, "width": self.width})

    def sampling(self, repos: Iterable[str], device: "torch.device") -> "Sampling":
        """Settings of the images, with defaults for a device filled in.

        Args:
            repos: pipelines of all models; they must agree on a size unless height and width are given.
            device: where the images are sampled.
        """
        from lit_align.commands.shared.models import Sampling, default_precision, native_size

        height, width = self.height, self.width
        if height is None or width is None:
            native = native_size(repos, self.vae_repo)
            height, width = height or native, width or native
        return Sampling(height, width, self.steps, self.precision or default_precision(device))

    def guidance_for(self, repo: str) -> float:
        """Guidance scale, by default the one of a pipeline's own call."""
        from lit_align.commands.shared.models import default_guidance_scale

        return default_guidance_scale(repo) if self.guidance_scale is None else self.guidance_scale
