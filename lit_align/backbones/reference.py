"""Reference models: a frozen copy of the denoiser, or a second, frozen adapter on it.

A reference starts as the pretrained model, equal to the policy, and only changes in `update`.
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

from lit_align.backbones.compiled import plain_name
from lit_align.backbones.lora import POLICY, REFERENCE, add_adapter
from lit_align.backbones.sharding import Denoiser, norm_of_parts, to_local
from lit_align.user_errors import UserValueError


class Reference(nn.Module, ABC):
    """A frozen model that an objective compares the policy with."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = False  # whether it is no longer the pretrained model, and so belongs in checkpoints

    @abstractmethod
    def active(self) -> AbstractContextManager[Denoiser]:
        """Return a context that yields a denoiser with the reference's weights."""

    @abstractmethod
    def pairs(self) -> dict[str, tuple[Tensor, nn.Parameter]]:
        """Pair each of the reference's tensors with the policy's, by the name of the former in the backbone."""

    @abstractmethod
    def own_denoisers(self) -> list[Denoiser]:
        """List denoisers beside the policy's that need memory of their own."""

    @abstractmethod
    def check_alpha(self, alpha: float) -> None:
        """Raise a ValueError if `update` cannot blend exactly with this `alpha`."""

    @torch.no_grad()
    def update(self, alpha: float) -> None:
        """Blend: reference <- alpha policy + (1 - alpha) reference; alpha 1 copies bit for bit."""
        self.check_alpha(alpha)
        for frozen, policy in self.pairs().values():
            if alpha == 1:
                to_local(frozen).copy_(to_local(policy))
            else:
                to_local(frozen).lerp_(to_local(policy), alpha)
        self.moved = True

    @torch.no_grad()
    def distance(self) -> Tensor:
        """Euclidean distance of the trained weights from the reference's, scalar. A collective if sharded."""
        # Tensor by tensor: all differences at once would take the memory of a third denoiser.
        pairs = list(self.pairs().values())
        parts = torch.stack([torch.dist(to_local(policy), to_local(frozen)) for frozen, policy in pairs])
        return norm_of_parts(parts, like=pairs[0][1])


def force_contiguous_proj_in(denoiser: Denoiser) -> None:
    """Make the denoiser predict equal numbers with and without gradients.

    For a strided activation, torch chooses the matrix product by whether the weight requires a gradient. diffusers'
    transformers begin with such a product, so that in bfloat16 the reference rounded differently from an equal policy,
    in 20 of 26 batches of the bundled pairs.
    """
    for module in denoiser.modules():
        if isinstance(module, Transformer2DModel):
            projection = getattr(module.proj_in, "base_layer", module.proj_in)  # inside peft's wrapper, if there is one
            if isinstance(projection, nn.Linear):
                projection.register_forward_pre_hook(_contiguous)


def _contiguous(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(),)


class FrozenCopy(Reference):
    """A second denoiser in memory, for full fine-tuning.

    It has the policy's precision, so that right after a copy both predict equal bits.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self._policy = [denoiser]  # in a list, so that it is not registered as a submodule here too
        self.denoiser = copy.deepcopy(denoiser).requires_grad_(False).eval()

    @contextmanager
    def active(self) -> Iterator[Denoiser]:
        yield self.denoiser

    def pairs(self) -> dict[str, tuple[Tensor, nn.Parameter]]:
        policy = {plain_name(name): weight for name, weight in self._policy[0].named_parameters()}
        own = {plain_name(name): weight for name, weight in self.denoiser.named_parameters()}
        return {f"reference.denoiser.{name}": (weight, policy[name]) for name, weight in own.items()}

    def own_denoisers(self) -> list[Denoiser]:
        return [self.denoiser]

    def check_alpha(self, alpha: float) -> None:
        return


class FrozenAdapter(Reference):
    """A second, frozen adapter on the policy's denoiser, which needs the memory of an adapter, not of a UNet."""

    def __init__(self, denoiser: Denoiser, config: LoraConfig) -> None:
        super().__init__()
        self._policy = [denoiser]
        add_adapter(denoiser, config, REFERENCE)  # peft activates and unfreezes new adapters
        self._activate(POLICY)
        for frozen, policy in self.pairs().values():
            frozen.data = policy.detach().clone()

    def _activate(self, adapter: str) -> None:
        for module in self._policy[0].modules():
            if isinstance(module, BaseTunerLayer):
                if adapter == REFERENCE and not self.moved:  # it adds zeros: equal bits without its products
                    module.enable_adapters(False)
                elif module.disable_adapters:
                    module.enable_adapters(True)  # the policy's
                else:
                    module.set_adapter(adapter, inference_mode=adapter == REFERENCE)

    @contextmanager
    def active(self) -> Iterator[Denoiser]:
        """Enter it before the policy's forward pass: it switches off the policy's `requires_grad` meanwhile."""
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
        parameters = {plain_name(name): weight for name, weight in self._policy[0].named_parameters()}
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
