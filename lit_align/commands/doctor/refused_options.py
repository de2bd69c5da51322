"""Options that `fit` would refuse once it has the model on its device."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from lit_align.backbones import Backbone
from lit_align.backbones.attention import check_kernel
from lit_align.commands.doctor.machine import Machine
from lit_align.commands.doctor.run_parts import RunParts
from lit_align.training.compensated import check_compensation
from lit_align.training.precisions import compute_dtype
from lit_align.user_errors import UserValueError


def refused_options(
    parts: RunParts, machine: Machine, backbone: Backbone | None, device: torch.device | None
) -> Iterator[UserValueError]:
    """List the errors that the run's options would raise.

    Args:
        parts: parts of the run.
        machine: machine of the run.
        backbone: on the meta device; None if it cannot be built.
        device: of the run; None if it is elsewhere, where the attention's kernel cannot be tried.
    """
    model, optimizer = parts.config.model, parts.optimizer()
    wanted = model.backbone.init_args
    options = {"lora": wanted.lora is not None, "channels_last": wanted.channels_last}
    options["offload"] = wanted.activation_offload
    for refusal in machine.refusals(precision=machine.precision, optimizer=optimizer, **options):
        yield UserValueError(refusal)
    checks: list[Callable[[], None]] = [partial(check_compensation, model.compensate_rounding, machine.precision)]
    if backbone is not None and device is not None:
        dtype = compute_dtype(machine.precision)
        checks.append(partial(check_kernel, backbone.denoiser, model.attention, device, dtype))
    for check in checks:
        try:
            check()
        except UserValueError as error:
            yield error
