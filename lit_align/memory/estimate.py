"""Estimate a training step's memory by taking the step on meta tensors, which have shapes but no content.

Left out: the device's context, workspaces of its libraries, and the allocator's fragmentation.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_align.backbones.attention import use_kernel
from lit_align.backbones.loading.meta import shapes_only
from lit_align.internals import backward
from lit_align.memory.autocast import FusedAttention, MetaAutocast
from lit_align.memory.live import LiveBytes, count_saved
from lit_align.memory.main_memory import MeasuredOffload
from lit_align.memory.optimizer_bytes import OptimizerBytes, measure_optimizer
from lit_align.memory.shares import Shares
from lit_align.memory.weight_bytes import WeightBytes, weigh
from lit_align.training.module import AlignmentModule
from lit_align.training.precisions import COMPUTE_DTYPES
from lit_align.user_errors import UserValueError

ENCODING = ("VAE", "text encoders")  # stages that a run on a cache skips
META = torch.device("meta")
PRECISIONS = {*COMPUTE_DTYPES, "32-true"}


class UnknownPrecision(UserValueError):
    """A precision for which memory cannot be estimated."""


@dataclass(frozen=True)
class Work:
    """Work of one device in a training step.

    Args:
        device: `cpu` or `cuda`, which differ in autocast and attention.
        precision: the Trainer's precision, in full spelling.
        batch_size: pairs per micro-batch.
        height: height of the images, pixels.
        width: width of the images, pixels.
        encoded: whether all pairs come from a cache.
        shares: how a strategy divides memory over devices.
    """

    device: str
    precision: str
    batch_size: int
    height: int
    width: int
    encoded: bool = False
    shares: Shares = Shares()  # noqa: RUF009  # a NamedTuple


@dataclass(frozen=True)
class Estimate:
    """Bytes that a device needs."""

    weights: WeightBytes
    buckets: int  # DDP's copies of the gradients
    optimizer: OptimizerBytes | None  # None where it cannot be measured
    saved: int  # by autograd for the backward pass
    stages: dict[str, int]  # peak of each part of a step, on top of `standing`
    waiting: int = 0  # of `saved`, in main memory

    @property
    def standing(self) -> int:
        """Bytes in use between steps."""
        state = 0 if self.optimizer is None else self.optimizer.state
        return self.weights.parameters + self.weights.gradients + self.buckets + state

    @property
    def activations(self) -> int:
        """Bytes that the largest part of a step adds."""
        return max(self.stages.values())

    @property
    def total(self) -> int:
        """Peak of a step."""
        return self.standing + self.activations


def estimate(module: AlignmentModule, work: Work) -> Estimate:
    """Estimate memory by a step on the meta device.

    Args:
        module: module built within `shapes_only`. It is cast as in a run, so it cannot be used again.
        work: work of one device.

    Raises:
        UnknownPrecision: if the precision's memory is not known.
        OSError: if a config or a tokenizer cannot be found.
    """
    if work.precision not in PRECISIONS:
        raise UnknownPrecision(
            f"trainer.precision {work.precision}: its memory is not known. Known: {sorted(PRECISIONS)}."
        )
    with shapes_only():  # encoders are loaded here
        prepare(module, work)
        weights = weigh(module.backbone)
        trained = list(module.backbone.trainable_parameters().values())
        optimizer = measure_optimizer(module.optimizer, trained, foreach=work.device != "cpu")
        step = MetaStep(module, work)
        saved, stages = step.run()
    width = COMPUTE_DTYPES.get(work.precision, torch.float32).itemsize  # bytes of a gathered weight
    stages["policy"] += width * work.shares.of_policy(module.backbone.denoiser)
    if "reference" in stages:
        stages["reference"] += width * work.shares.of_reference(module.backbone.denoiser)
    if optimizer is not None:
        stages["optimizer step"] = work.shares.of_optimizer(optimizer.step)
        optimizer = OptimizerBytes(work.shares.of_optimizer(optimizer.state), optimizer.step)
    shares, waiting = work.shares, saved if step.offloads else 0
    return Estimate(shares.of_weights(weights), shares.buckets(weights), optimizer, saved, stages, waiting)


def prepare(module: AlignmentModule, work: Work) -> None:
    """Cast and load like the Trainer and `AlignmentModule.on_fit_start`."""
    backbone, dtype = module.backbone, COMPUTE_DTYPES.get(work.precision, torch.float32)
    nn.Module.to(backbone, "meta")
    if work.precision.endswith("-true"):
        nn.Module.to(backbone, dtype)
    module.train()
    backbone.cast_frozen(dtype)
    use_kernel(backbone, module.attention)
    if not work.encoded:
        backbone.load_encoders()


class MetaStep:
    """Takes a training step on the meta device.

    Args:
        module: module after `prepare`.
        work: work of one device.
    """

    def __init__(self, module: AlignmentModule, work: Work) -> None:
        self.module, self.backbone, self.work = module, module.backbone, work
        self.offloads = self.backbone.activation_offload and work.device != "cpu"
        self.stages: dict[str, int] = {}
        self.live = LiveBytes()

    def run(self) -> tuple[int, dict[str, int]]:
        """Return the bytes that autograd saves, and the peak of each stage."""
        trained = self.backbone.trainable_parameters().values()
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        standing = [*self.backbone.parameters(), *self.backbone.buffers(), *(p.grad for p in trained)]
        self.live = LiveBytes([tensor for tensor in standing if tensor is not None])
        with ExitStack() as stack:
            stack.enter_context(FusedAttention(self.work.device))
            stack.enter_context(self.live)
            inputs = self._inputs()
            return self._denoise(inputs), self.stages

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Record the peak within this context as the stage's."""
        self.live.peak = self.live.now
        yield
        self.stages[name] = self.live.peak

    @torch.no_grad()
    def _inputs(self) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        """Make noisy latents, timesteps, conditioning and time_ids of both images of all pairs."""
        work, images = self.work, 2 * self.work.batch_size
        latents = torch.empty(images, *self.backbone.latent_shape(work.height, work.width), device="meta")
        if not work.encoded:
            with self._stage(ENCODING[0]):
                pixels = torch.empty(images, 3, work.height, work.width, dtype=torch.uint8, device="meta")
                latents = self.backbone.encode_images(pixels, latents)
                del pixels
        with self.backbone.borrowed_encoders(), self._stage(ENCODING[1]):
            once = self.backbone.encode_prompts(["a"] * work.batch_size)
        if work.encoded:
            del self.stages[ENCODING[1]]  # only loaded for the shapes of what a cache holds
        conditioning = {name: torch.cat([value, value]) for name, value in once.items()}
        timesteps = torch.zeros(images, dtype=torch.int64, device="meta")
        return latents, timesteps, conditioning, torch.zeros(images, 6, dtype=torch.int64, device="meta")

    def _count_saved(self) -> AbstractContextManager[Callable[[], int]]:
        if self.offloads:
            return MeasuredOffload(self.backbone.denoiser, META, self.live, home=META).counted()
        return count_saved(self.backbone.parameters(), self.live)

    def _denoise(self, inputs: tuple[Tensor, Tensor, dict[str, Tensor], Tensor]) -> int:
        mixed, dtype = self.work.precision.endswith("-mixed"), COMPUTE_DTYPES.get(self.work.precision)
        with ExitStack() as stack:
            gathered = self.live if self.work.shares.gathered != "nothing" else None
            cast = stack.enter_context(MetaAutocast(self.work.device, dtype, gathered)) if mixed and dtype else None
            if self.backbone.reference is not None:
                with self._stage("reference"):
                    self.backbone.denoise_by_reference(*inputs)
            with self._stage("policy"):
                with self._count_saved() as saved:
                    errors = (self.backbone.denoise(*inputs).float() - inputs[0]).square().flatten(1).mean(1)
                    bytes_saved = saved()
                if cast is not None:
                    cast.end_forward()
                backward(errors.sum())
        return bytes_saved
