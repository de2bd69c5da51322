"""Weights in bfloat16 that learn as float32 weights do, bit for bit where the gradients are equal."""

import math
from functools import partial

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from transformers.optimization import Adafactor

from lit_align.backbones import LoRA
from lit_align.callbacks import ReferenceUpdate, StartBanner
from lit_align.memory.optimizer_bytes import measure_optimizer
from lit_align.objectives import DiffusionDPO
from lit_align.training.compensated import LOW, Compensated, compensated, join, split
from lit_align.training.metrics import WeightedMeans
from lit_align.user_errors import UserValueError
from tests.support.processes import fork_ranks
from tests.support.runs import KeepLogs, equal, fit, keep_all, make_data, make_module, weights

TRUE = {"precision": "bf16-true"}
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.1),
    "fused": partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.1, fused=True),
    "momentum": partial(torch.optim.SGD, lr=1e-5, momentum=0.9, weight_decay=0.1),
    "8bit": partial(AdamW8bit, lr=1e-5, weight_decay=0.1),
    "adafactor": partial(Adafactor, lr=1e-5, scale_parameter=False, relative_step=False, warmup_init=False),
}


def test_split_keeps_every_bit_and_rounds_to_the_nearest():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-45])
    values = torch.cat([special, bits.view(torch.float32)])
    values = values[~values.isnan()]
    high, low = split(values)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(high, low).view(torch.int32), values.view(torch.int32))
    ties = (values.view(torch.int32) & 0xFFFF) == 0x8000  # torch rounds these to even, split away from zero
    assert torch.equal(high[~ties], values.bfloat16()[~ties])
    assert high[4:6].tolist() == [1 + 2**-7, -1 - 2**-7]
    worst = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert split(worst)[0].isnan().all()


def start():
    """Two matrices and a vector that bfloat16 holds exactly; the first is large enough for 8-bit states."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in ((80, 64), (6, 5), (7,))]


def train(build, dtype, steps, gradient):
    """Train copies of `start()`; `gradient(step, number, weight)` gives the gradients."""
    parameters = [torch.nn.Parameter(value.to(dtype)) for value in start()]
    optimizer = build(parameters)
    for step in range(steps):
        for number, weight in enumerate(parameters):
            weight.grad = gradient(step, number, weight).to(dtype)
        optimizer.step()
    return parameters, optimizer


def fixed(step, number, weight):
    """Gradients that do not depend on the weights."""
    generator = torch.Generator().manual_seed(3 * step + number)
    return (torch.randn(weight.shape, generator=generator) + 0.5).bfloat16()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_gradients_give_the_bits_of_float32_weights(name):
    build = OPTIMIZERS[name]
    exact, _ = train(build, torch.float32, 50, fixed)
    ours, optimizer = train(compensated(build), torch.bfloat16, 50, fixed)
    for weight, expected in zip(ours, exact, strict=True):
        assert weight.dtype == weight.grad.dtype == torch.bfloat16
        assert torch.equal(join(weight.data, optimizer.state[weight][LOW]), expected)
        assert torch.equal(weight, split(expected.detach())[0])


def test_small_steps_add_up_that_bfloat16_loses():
    """400 steps of a regression: plain AdamW's weights stay, ours follow those in float32."""
    targets = [value.float() - 0.01 for value in start()]

    def toward(step, number, weight):
        return weight.detach().float() - targets[number]

    build = partial(torch.optim.AdamW, lr=2e-5, weight_decay=0.0)
    exact, plain = (
        torch.cat([weight.detach().float().flatten() for weight in train(build, dtype, 400, toward)[0]])
        for dtype in (torch.float32, torch.bfloat16)
    )
    parameters, optimizer = train(compensated(build), torch.bfloat16, 400, toward)
    ours = torch.cat([join(weight.data, optimizer.state[weight][LOW]).flatten() for weight in parameters])
    begun = torch.cat([value.float().flatten() for value in start()])
    assert torch.equal(plain[begun.abs() > 0.01], begun[begun.abs() > 0.01])
    assert ((exact - begun).abs() > 0.006).all()
    off = (ours - exact).abs() / (exact - begun).abs()
    assert off[begun.abs() < 1].mean() < 0.02
    assert off.mean() < 0.1  # gradients are those at the rounded weights, which for larger ones are up to 0.008 away


def displacement(tmp_path, precision, **options):
    """Train the small SDXL for some steps; return how far all its weights moved from what bfloat16 holds of them."""
    module = make_module(**options)
    begun = {name: weight.bfloat16().float() for name, weight in weights(module).items()}
    for weight in module.backbone.trainable_parameters().values():
        weight.data = weight.data.bfloat16().float()
    build = partial(torch.optim.AdamW, lr=3e-6)
    module.optimizer = compensated(build) if options.get("compensate_rounding") else build
    trainer = fit(module, make_data(), tmp_path, 4, precision=precision, gradient_clip_val=1.0)
    state = trainer.optimizers[0].state
    found = module.backbone.trainable_parameters()
    full = {n: join(w.data, state[w][LOW]) if LOW in state[w] else w.detach().float() for n, w in found.items()}
    return torch.cat([(full[name] - begun[name]).flatten() for name in begun])


def test_a_real_model_moves_as_in_float32(tmp_path):
    exact = displacement(tmp_path, "32-true")
    plain = displacement(tmp_path, "bf16-true")
    ours = displacement(tmp_path, "bf16-true", compensate_rounding=True)
    cosine = partial(torch.nn.functional.cosine_similarity, exact, dim=0)
    assert cosine(ours) > 0.99
    assert ours.norm().item() == pytest.approx(exact.norm().item(), rel=0.01)
    assert (plain == 0).float().mean() > 0.9
    assert cosine(plain) < 0.3


@pytest.mark.parametrize(
    ("build", "lora"),
    [
        (partial(torch.optim.AdamW, lr=1e-5), None),
        (partial(torch.optim.AdamW, lr=1e-4), LoRA(rank=2, dropout=0.3)),
        (partial(AdamW8bit, lr=1e-5), None),
    ],
    ids=["adamw", "lora", "8bit"],
)
def test_a_resumed_run_ends_with_the_weights_of_the_unbroken_one(tmp_path, build, lora):
    def module():
        made = make_module(lora=lora, compensate_rounding=True)
        made.optimizer = compensated(build)
        return made

    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, **TRUE}
    whole = module()
    trained = fit(whole, make_data(), tmp_path, 3, callbacks=[keep_all(tmp_path, every_n_train_steps=2)], **options)
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert {state[LOW].dtype for state in saved.values()} == {torch.int16}
    if build.func is torch.optim.AdamW:
        assert {state["exp_avg_sq"].dtype for state in saved.values()} == {torch.float32}
    resumed = module()
    again = fit(resumed, make_data(), tmp_path, 3, ckpt_path=tmp_path / "step=2.ckpt", **options)
    assert equal(weights(resumed), weights(whole))
    lows = [[state[LOW] for state in trainer.optimizers[0].state.values()] for trainer in (trained, again)]
    assert all(map(torch.equal, *lows))
    assert sum(int(low.count_nonzero()) for low in lows[0]) > 1000
    plain = make_module(lora=lora)
    plain.optimizer = build
    with pytest.raises(UserValueError, match=r"model\.compensate_rounding was True, is False: refused"):
        fit(plain, make_data(), tmp_path, 3, ckpt_path=tmp_path / "step=2.ckpt", **options)


def test_dpo_begins_at_log_two_with_a_reference_in_bfloat16(tmp_path):
    module, logger = make_module(objective=DiffusionDPO(), compensate_rounding=True), KeepLogs()
    fit(
        module, make_data(), tmp_path, 3, callbacks=[ReferenceUpdate(every_n_steps=2)],
        logger=logger, log_every_n_steps=1, **TRUE,
    )  # fmt: skip
    reference = module.backbone.reference_weights()
    assert {weight.dtype for weight in reference.values()} == {torch.bfloat16}
    losses = [row["train/loss"] for _, row in logger.rows if "train/loss" in row]
    # At the start, and right after a copy; the loss of a batch is a bfloat16 number, its mean over batches is not.
    assert losses[0] == losses[2] == pytest.approx(math.log(2), abs=2e-3)
    assert losses[1] != losses[0]
    assert {metric.sums.dtype for metric in (module.train_metrics, module.val_metrics)} == {torch.float32}


def test_a_mean_over_many_pairs_in_half_precision_counts_them_all():
    """In bfloat16 a count stops to grow at 512 in steps of 2."""
    means = WeightedMeans(["value"]).to(torch.bfloat16)
    values = torch.tensor([0.25, 0.75]).bfloat16()
    for _ in range(1000):
        means.update({"value": (values, torch.ones(2).bfloat16())})
    assert means.weights.item() == 2000
    assert means.compute()["value"].item() == 0.5
    means.reset()
    assert means.sums.dtype == torch.float32


def _train_on_ranks(folder):
    """Two ranks with other inputs each: their gradients in four steps, and their weights then."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 4)).bfloat16()
    parallel = torch.nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    optimizer = compensated(partial(torch.optim.AdamW, lr=1e-2))(list(network.parameters()))
    torch.manual_seed(10 + rank)
    gradients = []
    for _ in range(4):
        parallel(torch.randn(16, 64).bfloat16()).square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten().float() for weight in network.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
    weights_now = torch.cat([weight.detach().flatten().float() for weight in network.parameters()])
    torch.save([*gradients, weights_now], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_stay_equal(tmp_path):
    """DDP averages the gradients after every step, not only before the first."""
    fork_ranks(lambda: _train_on_ranks(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first) == 5
    assert all(map(torch.equal, first, second))


def test_a_run_of_a_config_goes_on_in_python():
    build = partial(torch.optim.AdamW, lr=1e-5)
    assert type(compensated(build)([torch.nn.Parameter(torch.ones(1))])).__name__ == "AdamW"


def test_memory_of_weights_that_are_alike_is_that_of_each():
    shapes = [(80, 64), (80, 64), (6, 5), (80, 64)]
    weights_of = [torch.nn.Parameter(torch.ones(shape).bfloat16()) for shape in shapes]
    found = measure_optimizer(compensated(OPTIMIZERS["adamw"]), weights_of, foreach=True)
    count = sum(weight.numel() for weight in weights_of)
    assert found.state == count * (4 + 4 + 2) + 4 * len(shapes)  # two moments, the low bits, and a number of steps


def test_what_cannot_be_compensated_is_refused(tmp_path):
    for precision in ("bf16-mixed", "32-true"):
        message = rf"compensate_rounding is true, but trainer\.precision is {precision}.*Set trainer\.precision to bf16"
        with pytest.raises(UserValueError, match=message):
            fit(make_module(compensate_rounding=True), make_data(), tmp_path, 1, precision=precision)

    class Whole(torch.optim.AdamW):
        """Somebody's own."""

    parameters = [torch.nn.Parameter(torch.ones(2))]
    for build in (Whole, torch.optim.LBFGS):
        with pytest.raises(UserValueError, match=rf"is {build.__name__} of .*Choose an AdamW of torch\.optim or bits"):
            compensated(build)(parameters)


def test_the_banner_says_that_nothing_is_rounded_away(tmp_path, caplog):
    module = make_module(compensate_rounding=True)
    with caplog.at_level("INFO"):
        trainer = fit(module, make_data(), tmp_path, 1, callbacks=[StartBanner()], **TRUE)
    assert isinstance(trainer.optimizers[0], Compensated)
    assert "rounding    bf16-true: model.compensate_rounding keeps what is rounded off" in caplog.text
