"""The frozen twin that an objective compares the policy with: a copy of the denoiser, or a second adapter on it.

Both start equal to the policy at the start of a run, the pretrained model, and change only in `update`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lit_align.backbones.sharding import Denoiser, norm_of_parts, to_local
from lit_align.user_errors import UserValueError

POLICY, REFERENCE = "default", "reference"  # names of the adapters; the first is peft's own


class Reference(nn.Module, ABC):
    """A model that never learns."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = False  # whether it is no longer the pretrained model, and so belongs in checkpoints

    @abstractmethod
    def active(self) -> AbstractContextManager[Denoiser]:
        """A context in which the denoiser that it gives predicts as the reference does."""

    @abstractmethod
    def pairs(self) -> dict[str, tuple[Tensor, nn.Parameter]]:
        """The reference's tensors beside the policy's, by the reference's name in the backbone."""

    @abstractmethod
    def own_denoisers(self) -> list[Denoiser]:
        """Denoisers beside the policy's, which take memory of their own."""

    @abstractmethod
    def check_alpha(self, alpha: float) -> None:
        """Raise a ValueError where `update` cannot move it by `alpha` exactly."""

    @torch.no_grad()
    def update(self, alpha: float) -> None:
        """reference <- alpha policy + (1 - alpha) reference; alpha 1 copies bit for bit."""
        self.check_alpha(alpha)
        for frozen, policy in self.pairs().values():
            if alpha == 1:
                to_local(frozen).copy_(to_local(policy))
            else:
                to_local(frozen).lerp_(to_local(policy), alpha)
        self.moved = True

    @torch.no_grad()
    def distance(self) -> Tensor:
        """Euclidean distance of the policy's trained weights from the reference's, scalar; a collective if sharded."""
        # Tensor by tensor: all differences at once would be a third denoiser in memory.
        pairs = list(self.pairs().values())
        parts = torch.stack([torch.dist(to_local(policy), to_local(frozen)) for frozen, policy in pairs])
        return norm_of_parts(parts, like=pairs[0][1])


def force_contiguous_proj_in(denoiser: Denoiser) -> None:
    """Make the denoiser predict equal numbers with and without gradients.

    torch multiplies a strided activation by a weight in one way where the weight requires a gradient and in another
    where it does not. diffusers' transformers begin with such a product, and in bfloat16 the reference then rounded
    otherwise than an equal policy: in 20 of 26 batches of the bundled pairs.
    """
    for module in denoiser.modules():
        if isinstance(module, Transformer2DModel):
            projection = getattr(module.proj_in, "base_layer", module.proj_in)  # where peft has wrapped it
            if isinstance(projection, nn.Linear):
                projection.register_forward_pre_hook(_contiguous)


def _contiguous(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(),)


class FrozenCopy(Reference):
    """A second denoiser in memory, for full fine-tuning.

    It keeps the policy's float32, so that right after a copy both predict the same to the last bit.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self._policy = [denoiser]  # in a list, for it is the backbone's child, not ours
        self.denoiser = copy.deepcopy(denoiser).requires_grad_(False).eval()

    @contextmanager
    def active(self) -> Iterator[Denoiser]:
        yield self.denoiser

    def pairs(self) -> dict[str, tuple[Tensor, nn.Parameter]]:
        policy = dict(self._policy[0].named_parameters())
        return {f"reference.denoiser.{name}": (p, policy[name]) for name, p in self.denoiser.named_parameters()}

    def own_denoisers(self) -> list[Denoiser]:
        return [self.denoiser]

    def check_alpha(self, alpha: float) -> None:
        return


class FrozenAdapter(Reference):
    """A second, frozen adapter on the policy's own denoiser: its memory is the adapter's, not a UNet's."""

    def __init__(self, denoiser: Denoiser, config: LoraConfig) -> None:
        super().__init__()
        self._policy = [denoiser]
        with denoiser.device:
            denoiser.add_adapter(config, REFERENCE)  # peft activates and unfreezes what it adds
        self._activate(POLICY)
        self.update(1.0)
        self.moved = False

    def _activate(self, adapter: str) -> None:
        for module in self._policy[0].modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(adapter, inference_mode=adapter == REFERENCE)

    @contextmanager
    def active(self) -> Iterator[Denoiser]:
        """Enter it before the policy's forward pass: it takes the policy's `requires_grad` away for a while."""
        denoiser = self._policy[0]
        training = denoiser.training
        self._activate(REFERENCE)
        denoiser.eval()  # no dropout
        try:
            yield denoiser
        finally:
            self._activate(POLICY)
            denoiser.train(training)

    def pairs(self) -> dict[str, tuple[Tensor, nn.Parameter]]:
        parameters = dict(self._policy[0].named_parameters())
        return {
            f"denoiser.{name}": (p, parameters[name.replace(f".{REFERENCE}.", f".{POLICY}.")])
            for name, p in parameters.items()
            if f".{REFERENCE}." in name
        }

    def own_denoisers(self) -> list[Denoiser]:
        return []

    def check_alpha(self, alpha: float) -> None:
        if alpha != 1:
            raise UserValueError(
                f"ReferenceUpdate.alpha is {alpha}, but a LoRA reference can only be copied (alpha 1): a blend of the "
                "factors A and B is not a blend of the products B A. Use alpha 1, or full fine-tuning."
            )
