"""The sample grid changes nothing in the run and survives a resume; the banner and the speed are correct."""

import time

import lightning as L
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_align.backbones import LoRA
from lit_align.backbones.sampling import generate
from lit_align.callbacks import SampleGrid, StartBanner, StepProgress, Throughput
from lit_align.callbacks.sample_grid import draw_grid
from lit_align.evaluation.image_statistics import against_base, describe, image_statistics
from tests.support.runs import equal, fit, make_data, make_module, weights


def grid(**changes):
    return SampleGrid(
        ["fox", "tulip", "cactus"], **{"every_n_steps": 2, "height": 32, "width": 32, "steps": 2, **changes}
    )


def draw(module, callback):
    return [generate(module.backbone, [p], [i], 32, 32, steps=2)[0] for i, p in enumerate(callback.prompts)]


def test_grid_changes_nothing_in_the_run(tmp_path):
    runs = []
    for callbacks in ([], [grid()]):
        module = make_module()
        fit(module, make_data(), tmp_path, steps=4, callbacks=callbacks)
        runs.append((weights(module), torch.get_rng_state()))
    assert equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_grid_draws_the_live_model_beside_the_base(tmp_path):
    module, callback = make_module(), grid()
    base = draw(module, callback)
    fit(module, make_data(), tmp_path, steps=3, callbacks=[callback])
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == ["step-0000002.png", "step-0000003.png"]
    expected = draw_grid(callback.prompts, {"base": base, "step 3": draw(module, callback)})
    assert Image.open(files[-1]).tobytes() == expected.tobytes()


def test_resumed_run_keeps_the_base_images(tmp_path):
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True)
    first = grid()
    fit(make_module(lora=LoRA(rank=2)), make_data(), tmp_path, steps=2, callbacks=[first, checkpoint])
    second = grid()
    fit(make_module(lora=LoRA(rank=2)), make_data(), tmp_path, 3, tmp_path / "last.ckpt", callbacks=[second])
    assert len(first.base) == 3
    assert second.base == first.base
    other = SampleGrid(["fox", "tulip", "rose"], every_n_steps=2, height=32, width=32, steps=2)
    with pytest.warns(UserWarning, match="prompts or sampling differ"):
        other.load_state_dict(first.state_dict())
    assert other.base == []


def test_grid_waits_for_a_whole_step(tmp_path):
    """Under accumulation several batches in a row end with one step count, at first 0."""
    fit(make_module(), make_data(), tmp_path, steps=2, callbacks=[grid(every_n_steps=1)], accumulate_grad_batches=2)
    names = [path.name for path in sorted((tmp_path / "samples").iterdir())]
    assert names == ["step-0000001.png", "step-0000002.png"]


def test_grid_without_prompts_is_refused():
    with pytest.raises(ValueError, match=r"SampleGrid\.prompts is empty"):
        SampleGrid([])


def test_statistics_of_images_by_hand():
    """A flat colour; a black and white image; a white dot, whose Laplacian is -4, 4 times 1 and 4 times 0."""
    flat = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 5, 5)
    assert image_statistics(flat) == {
        "red": 10,
        "green": 20,
        "blue": 30,
        "contrast": 0,
        "colourfulness": pytest.approx(0.3 * (10**2 + 15**2) ** 0.5),  # red - green = -10, yellow - blue = -15
        "sharpness": 0,
        "saturated": 0,
    }
    halves = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    halves[..., 2:] = 255
    found = image_statistics(halves)
    assert found["contrast"] == pytest.approx(127.5)
    assert (found["saturated"], found["colourfulness"]) == (1, 0)
    dot = torch.zeros(1, 3, 5, 5, dtype=torch.uint8)
    dot[..., 2, 2] = 100
    assert image_statistics(dot)["sharpness"] == pytest.approx(100**2 * (16 + 4) / 9)
    pure = torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)
    pure[0, 1, 0, :] = 255  # one channel of 4 of 16 pixels
    assert image_statistics(pure)["saturated"] == 0.25
    both = image_statistics(torch.cat([halves, torch.full_like(halves, 100)]))
    assert both["contrast"] == pytest.approx(127.5 / 2)  # the mean over images
    assert both["saturated"] == 0.5


def test_statistics_against_the_base():
    base = dict.fromkeys(("red", "green", "blue", "contrast", "colourfulness", "sharpness", "saturated"), 2.0)
    now = base | {"red": 5.0, "contrast": 3.0, "saturated": 1.75}
    change = against_base(now, base | {"sharpness": 0.0})
    assert (change["red"], change["green"], change["contrast"], change["saturated"]) == (3, 0, 1.5, -0.25)
    assert change["sharpness"] == float("inf")
    assert "red 5.00 (+3.00), green 2.00 (+0.00)" in describe(now, change)
    assert "contrast 3.00 (x 1.50)" in describe(now, change)
    assert describe(now, {}).endswith("saturated 1.75")


def test_grid_logs_the_statistics_of_its_images(tmp_path):
    module, callback = make_module(), grid()
    base = image_statistics(torch.stack(draw(module, callback)))
    logger = L.pytorch.loggers.TensorBoardLogger(tmp_path, name="", version="")
    fit(module, make_data(), tmp_path, steps=3, callbacks=[callback], logger=logger)
    now = image_statistics(torch.stack(draw(module, callback)))
    assert now != base
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, value in now.items():
        logged = events.Scalars(f"samples/{name}")
        assert [point.step for point in logged] == [2, 3]
        assert logged[-1].value == pytest.approx(value)
        assert events.Scalars(f"samples/{name}_vs_base")[-1].value == pytest.approx(
            against_base(now, base)[name], abs=1e-6
        )


def test_banner_counts_parameters_and_pairs(tmp_path):
    module, data = make_module(lora=LoRA(rank=2)), make_data(batch_size=4)
    trainer = fit(module, data, tmp_path, steps=1, accumulate_grad_batches=3)
    text = StartBanner().text(trainer, module)
    trainable = sum(p.numel() for p in module.backbone.trainable_parameters().values())
    assert f"{trainable:,} of " in text
    assert "12 pairs a step = 4 a device x 3 accumulated x 1 devices" in text
    assert module.objective.formula() in text


class Nap(L.Callback):
    started: float | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.started = self.started or time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seconds = time.monotonic() - self.started

    def on_validation_epoch_end(self, trainer, pl_module):
        time.sleep(1.0)


class SlowGrid(SampleGrid):
    def _images(self, trainer, pl_module):
        start = time.monotonic()
        time.sleep(1.0)
        images = super()._images(trainer, pl_module)
        self.seconds.append(time.monotonic() - start)
        return images


def test_weights_without_a_gradient_are_named(tmp_path):
    module = make_module()
    module.backbone.denoiser.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
    with pytest.warns(
        UserWarning, match=r"1 of the trained weights got no gradient .* such as backbone\.denoiser\.idle"
    ):
        fit(module, make_data(), tmp_path, steps=2, callbacks=[StartBanner()])


def test_throughput_leaves_validation_and_sampling_out(tmp_path):
    grid, nap = SlowGrid(["fox"], every_n_steps=2, height=32, width=32, steps=1), Nap()
    grid.seconds = []
    trainer = fit(
        make_module(),
        make_data(),
        tmp_path,
        steps=4,
        callbacks=[StartBanner(), grid, Throughput(), nap],
        log_every_n_steps=4,
        limit_val_batches=1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    speed = trainer.callback_metrics["train/pairs_per_second"]
    assert len(grid.seconds) == 3  # the first is of the base model, before the first batch
    # Of the time from the first batch to the end of the last, two grids and the nap after three steps are not counted.
    assert 8 / speed < nap.seconds - sum(grid.seconds[1:]) - 0.99


def test_progress_counts_optimizer_steps_of_the_whole_run(tmp_path, capsys):
    trainer = fit(
        make_module(),
        make_data(batch_size=4),
        tmp_path,
        steps=15,
        callbacks=[StepProgress(), Throughput()],
        log_every_n_steps=5,
    )
    assert trainer.global_step == 15  # more than the 13 of an epoch
    line = capsys.readouterr().err.splitlines()[-1]
    assert "15/15" in line
    assert "loss=" in line
    assert "accuracy=" in line
    assert "pairs/s=" in line
