"""Gradients are clipped as the Trainer says, with fused optimizers too, and the norm is that from before."""

from functools import partial

import lightning as L
import pytest
import torch

from lit_align.backbones import LoRA
from lit_align.training.clipping import clip
from tests.support.runs import equal, fit, keep_all, make_data, make_module, weights


@pytest.mark.parametrize(
    ("most", "algorithm", "expected"),
    [
        (None, None, [3.0, -4.0]),
        (0, "norm", [3.0, -4.0]),
        (10.0, "norm", [3.0, -4.0]),
        (1.0, None, [0.6, -0.8]),
        (1.0, "norm", [0.6, -0.8]),
        (3.5, "value", [3.0, -3.5]),
    ],
)
def test_gradients_are_clipped_by_their_norm_or_their_values(most, algorithm, expected):
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([-4.0])
    assert clip([first, second], most, algorithm).item() == 5.0
    assert [first.grad.item(), second.grad.item()] == pytest.approx(expected, rel=1e-5)


class Scaled(L.Callback):
    """Scales the loss as 16-mixed does on a GPU."""

    def on_train_start(self, trainer, pl_module):
        trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


def test_a_run_goes_on_without_its_fused_optimizer_and_the_other_way_round(tmp_path):
    """The groups of the checkpoint say how a step is made, whatever the optimizer was built for; in 16-mixed too."""
    ends = []
    for began, goes_on in ((None, None), (None, True), (True, None)):
        for name, fused, steps in (("began", began, 1), ("goes on", goes_on, 2)):
            module = make_module(lora=LoRA(rank=2))
            module.optimizer = partial(torch.optim.AdamW, lr=1e-4, fused=fused)
            callbacks = [Scaled(), keep_all(tmp_path, every_n_train_steps=1)]
            path = None if name == "began" else tmp_path / "step=1.ckpt"
            fit(module, make_data(), tmp_path, steps, path, callbacks, precision="bf16-mixed", gradient_clip_val=1.0)
        ends.append(weights(module))
    plain, kept, fused = ends
    assert equal(plain, kept)
    for name, weight in plain.items():
        torch.testing.assert_close(fused[name], weight, rtol=1e-4, atol=1e-6)


def test_a_negative_limit_does_not_clip():
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.tensor([3.0])
    for algorithm in ("norm", "value"):
        clip([weight], -1.0, algorithm)
    assert weight.grad.item() == 3.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train with clipped gradients by some optimizer in bf16-mixed; returns the weights, their change, and the norm."""

    def train(fused, scaled=False, algorithm="norm"):
        module = make_module(lora=LoRA(rank=2))
        before = weights(module)
        module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1.0, fused=fused)
        options = {"precision": "bf16-mixed", "gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
        fit(module, make_data(), tmp_path_factory.mktemp("run"), 1, callbacks=[Scaled()] if scaled else [], **options)
        after = weights(module)
        change = torch.cat([(after[name] - before[name]).flatten() for name in after])
        return after, change, module.gradient_norm.item()

    return train


def test_a_fused_optimizer_clips_in_mixed_precision(trained):
    plain, change, norm = trained(False)
    fused, _, fused_norm = trained(True)
    assert norm == fused_norm > 0.01
    assert change.norm().item() == pytest.approx(0.01, rel=1e-3)  # the rate is 1
    for name, weight in plain.items():
        torch.testing.assert_close(fused[name], weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_sees_gradients_without_their_scale(trained, algorithm):
    plain, _, norm = trained(True, algorithm=algorithm)
    scaled, _, scaled_norm = trained(True, scaled=True, algorithm=algorithm)
    assert norm == scaled_norm
    assert equal(plain, scaled)
