"""What a device can do at best, and what a model costs: operations and calls per second, counted operations."""

import time
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accelerator_site import Site


def forward_flops(site: Site, kind: str) -> int:
    """Count the floating-point operations of the UNet's forward pass over one image, without memory or time."""
    config = UNet2DConditionModel.load_config(site.pipeline(kind), subfolder="unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        side, added = site.resolution(kind) // 8, {}
        if kind == "sdxl":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * 256
            added = {"text_embeds": torch.ones(1, pooled), "time_ids": torch.ones(1, 6)}
        tokens = torch.ones(1, 77, config["cross_attention_dim"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(torch.ones(1, 4, side, side), torch.ones(1), tokens, added_cond_kwargs=added)
    return counter.get_total_flops()


def matmul_rate(device: str, side: int, seconds: float = 1.0) -> float:
    """Measure the bfloat16 operations per second of a large matrix product."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return calls_per_second(lambda: left @ right, device, seconds) * 2 * side**3


def calls_per_second(call: Callable[[], object], device: str, seconds: float) -> float:
    """Call a function for some seconds, after three calls that warm it up; the device is waited for every ten calls."""
    for _ in range(3):
        call()
    count, start = 0, now(device)
    while now(device) - start < seconds:
        for _ in range(10):
            call()
        count += 10
    return count / (now(device) - start)


def now(device: str) -> float:
    """Seconds of a clock, once the device has done what it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
