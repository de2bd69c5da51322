"""The training step, validation and their logs, on a small pipeline and the bundled pairs."""

import itertools

import lightning as L
import pytest
import torch
from diffusers import DDIMScheduler

from lit_align.backbones import LoRA, StableDiffusion
from lit_align.data import PreferenceDataModule
from lit_align.objectives import SFT
from lit_align.types import EncodedBatch, Moments, PairInfo
from tests.support.paths import PAIRS
from tests.support.runs import KeepLogs, fit, make_data, make_module, weights
from tests.support.shards import read_dicts, write_dicts


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_frozen_parts_never_change_and_trained_ones_do(tmp_path, lora):
    module = make_module(lora=lora)
    before = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    trained = set(module.backbone.trainable_parameters())
    fit(module, make_data(), tmp_path, steps=2)
    after = module.backbone.state_dict()
    for name, value in before.items():
        if name not in trained:
            assert torch.equal(value, after[name]), name
    moved = [name for name in trained if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.9 * len(trained)


def test_pair_members_share_noise_timestep_and_prompt(tmp_path):
    """Both errors are equal when chosen and rejected are the same image."""
    module = make_module(caption_dropout=0.5)

    class Twins(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            twins = batch._replace(images=batch.images[:, [0, 0]], time_ids=batch.time_ids[:, [0, 0]])
            encoded = module.backbone.encode(twins)
            draw, without_prompt = module.training_draw(encoded)
            errors = module.backbone.pair_errors(encoded.drop_prompts(without_prompt), draw)
            torch.testing.assert_close(errors.chosen, errors.rejected, rtol=1e-4, atol=1e-6)
            dropped.extend(without_prompt.tolist())
            times.extend(draw.timesteps.tolist())

    dropped, times = [], []
    fit(module, make_data(batch_size=8), tmp_path, steps=4, callbacks=[Twins()])
    assert 4 < sum(dropped) < 28
    assert len(set(times)) > 25


class ByHand(L.Callback):
    """Computes the loss of SFT before each step, with the scheduler of diffusers."""

    def __init__(self, repo):
        self.scheduler, self.losses = DDIMScheduler.from_pretrained(repo, subfolder="scheduler"), []

    @torch.no_grad()
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        backbone = pl_module.backbone
        draw, _ = pl_module.training_draw(backbone.encode(batch))
        posterior = backbone.vae.encode(batch.images[:, 0] / 127.5 - 1).latent_dist
        clean = (posterior.mean + posterior.std * draw.posterior_noise) * backbone.vae.config.scaling_factor
        noisy = self.scheduler.add_noise(clean, draw.noise, draw.timesteps)
        predicted = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(clean, draw.noise, draw.timesteps) if predicted else draw.noise
        (tokenizer,), (encoder,) = backbone.tokenizers, backbone.text_encoders
        hidden = encoder(tokenizer(batch.prompts, padding="max_length", return_tensors="pt").input_ids)[0]
        made = backbone.denoiser(noisy, draw.timesteps, hidden).sample
        self.losses.append((made - target).square().mean().item())


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_other_backbones_train(tmp_path, request, kind):
    repo = request.getfixturevalue(kind)
    module, by_hand = make_module(repo=repo, backbone=StableDiffusion, objective=SFT()), ByHand(repo)
    trainer = fit(module, make_data(batch_size=4), tmp_path, steps=3, log_every_n_steps=3, callbacks=[by_hand])
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(sum(by_hand.losses) / 3, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_half_precision_trains(tmp_path, precision, lora):
    """Time ids, the VAE and the noise schedule stay in float32."""
    module = make_module(lora=lora)
    seen = []
    module.backbone.denoiser.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(kwargs["added_cond_kwargs"]["time_ids"].dtype), with_kwargs=True
    )
    trainer = fit(module, make_data(), tmp_path, steps=2, precision=precision, log_every_n_steps=2)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert set(seen) == {torch.float32}
    assert next(module.backbone.vae.parameters()).dtype == torch.float32
    assert module.backbone.schedule.alphas_cumprod.dtype == torch.float32


def test_skipped_pairs_are_counted_at_the_end_and_train_nothing(tmp_path, caplog):
    samples = read_dicts(PAIRS / "train/00000.tar")[:8]
    samples[3] |= {"jpg_0.png": b"not an image"}
    del samples[5]["caption.txt"]
    shard = write_dicts(tmp_path / "broken.tar", samples)
    data = PreferenceDataModule(shard, resolution=32, batch_size=7, num_workers=0, on_error="skip")
    module = make_module()
    fit(module, data, tmp_path, steps=2)  # two epochs of one batch
    assert len(data.unreadable) == 1  # seen twice
    assert "1 broken training samples, and 1 pairs that could not be read here" in caplog.text
    assert samples[5]["__key__"] in caplog.text
    assert all(torch.isfinite(value).all() for value in weights(module).values())


def test_validation_gives_the_same_number_every_time(tmp_path):
    """Validation does not depend on batch size, number of workers or random state."""
    results = []
    for batch_size, workers in ((4, 0), (4, 0), (5, 2)):
        module = make_module(validation_draws=2)
        torch.manual_seed(len(results))
        data = make_data(batch_size=batch_size, num_workers=workers)
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
        (metrics,) = trainer.validate(module, data, verbose=False)
        results.append(metrics)
    assert results[0] == results[1]
    assert results[0]["val/accuracy"] == results[2]["val/accuracy"]
    assert results[0]["val/margin"] == pytest.approx(results[2]["val/margin"], rel=1e-4)
    assert results[0]["val/chosen_error"] == pytest.approx(results[2]["val/chosen_error"], rel=1e-5)


def test_logged_means_cover_all_micro_batches_of_the_interval(tmp_path):
    module, logger = make_module(), KeepLogs()
    losses = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert outputs["loss"].dtype == torch.float32
            losses.append(outputs["loss"].item() * 2)  # Lightning divides by the accumulation

    fit(
        module,
        make_data(),
        tmp_path,
        steps=4,
        callbacks=[Losses()],
        logger=logger,
        log_every_n_steps=2,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
    )
    rows = [row for _, row in logger.rows if "train/loss" in row]
    assert [row["train/loss"] for row in rows] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-5)
    assert {"train/accuracy", "train/margin", "train/chosen_error", "train/rejected_error", "train/loss/sft"} <= set(
        rows[0]
    )
    assert {"train/loss/preference", "train/gradient_norm", "train/learning_rate"} <= set(rows[0])
    assert rows[0]["train/learning_rate"] == pytest.approx(1e-4)
    total = rows[0]["train/loss/sft"] + rows[0]["train/loss/preference"]
    assert rows[0]["train/loss"] == pytest.approx(total, rel=1e-5)
    assert any(name.startswith("train/chosen_error/t") for name in rows[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_dropout": 1.2}, "model.caption_dropout is 1.2"),
        ({"validation_draws": 0}, "model.validation_draws is 0"),
        ({"attention": "xformers"}, "model.attention is 'xformers'; choose auto, flash, efficient, cudnn, math"),
        ({"float32_matmul": "tf32"}, "model.float32_matmul is 'tf32'; choose highest, high, medium"),
    ],
)
def test_senseless_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_module(**options)


def test_precision_of_matrix_products_is_set_where_it_is_asked_for(tmp_path):
    before = torch.get_float32_matmul_precision()
    try:
        for asked, expected in ((None, "medium"), ("high", "high")):
            torch.set_float32_matmul_precision("medium")
            fit(make_module(lora=LoRA(rank=2), float32_matmul=asked), make_data(), tmp_path, 1)
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def encoded():
    """Eight pairs with latents of 4 x 8 x 8."""
    nothing = torch.zeros(8)
    pairs = PairInfo(list(range(8)), nothing + 1, nothing.bool(), nothing.long(), nothing, nothing, voted=False)
    return EncodedBatch(Moments(torch.zeros(8, 2, 2, 4, 8, 8)), torch.zeros(8, 2, 6), {}, {}, pairs)


@pytest.fixture(scope="module")
def drawing():
    """A module that belongs to a Trainer, and drops half of the prompts."""
    module = make_module(caption_dropout=0.5, validation_draws=3)
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return module


def draw_at(module, encoded, seed=0, rank=0, micro_batch=0):
    module.seed, module.trainer.strategy.global_rank = seed, rank
    module.trainer.fit_loop.epoch_loop.batch_progress.total.ready = micro_batch + 1
    return module.training_draw(encoded)


def test_draws_depend_on_seed_rank_and_micro_batch_alone(drawing, encoded):
    places = [{}, {"seed": 1}, {"rank": 1}, {"micro_batch": 1}, {"rank": 1, "micro_batch": 1}, {"micro_batch": 10}]
    drawn = [draw_at(drawing, encoded, **place) for place in places]
    for first, second in itertools.combinations(drawn, 2):
        for name in ("noise", "posterior_noise"):
            shared = torch.isin(getattr(first[0], name), getattr(second[0], name)).sum()
            assert shared < 10  # of 2,048 float32 numbers, a few meet by chance
        assert not torch.equal(first[0].timesteps, second[0].timesteps)
    assert len({tuple(dropped.tolist()) for _, dropped in drawn}) == len(places)
    torch.manual_seed(9)
    for place, (draw, dropped) in zip(places, drawn, strict=True):
        again = draw_at(drawing, encoded, **place)
        assert all(torch.equal(a, b) for a, b in zip([*draw, dropped], [*again[0], again[1]], strict=True))


def test_coins_and_dropout_say_nothing_about_the_noise(drawing, encoded):
    """From one seed on the CPU, the first coins and the first pixels are made of the same numbers."""
    pixels, coins, features = [], [], []
    for micro_batch in range(300):
        draw, dropped = draw_at(drawing, encoded, micro_batch=micro_batch)
        pixels.append(draw.noise.flatten()[:8].square())
        coins.append(dropped)
        features.append(torch.rand(8) < 0.5)  # as dropout draws
    squares = torch.cat(pixels)
    for drawn in (torch.cat(coins), torch.cat(features)):
        assert drawn.float().mean() == pytest.approx(0.5, abs=0.05)
        assert squares[drawn].mean() == pytest.approx(1, abs=0.17)  # four standard deviations
        assert squares[~drawn].mean() == pytest.approx(1, abs=0.17)
    assert (torch.cat(coins) == torch.cat(features)).float().mean() == pytest.approx(0.5, abs=0.05)


def test_held_out_draws_of_neighbouring_pairs_differ(drawing, encoded):
    draws = [drawing.validation_draw(encoded, repeat) for repeat in range(3)]
    noise = torch.cat([draw.noise for draw in draws]).flatten(1)  # of 8 pairs, three times
    assert len(noise) == 24
    assert len({tuple(row.tolist()) for row in noise[:, :4]}) == 24
    assert len({time for draw in draws for time in draw.timesteps.tolist()}) == 24
    assert all(draw.posterior_noise is None for draw in draws)
