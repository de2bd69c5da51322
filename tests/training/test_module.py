"""The training step and the run around it, on the bundled pipeline and pairs."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml

from lit_align.backbones import LoRA, StableDiffusion
from lit_align.data import PreferenceDataModule
from lit_align.objectives import SFT
from lit_align.training.metrics import PreferenceMetrics, WeightedMeans, implicit_accuracy
from lit_align.types import ObjectiveOutput, PairErrors
from tests.support.paths import PAIRS, ROOT
from tests.support.runs import KeepLogs, Recorder, equal, fit, make_data, make_module, weights
from tests.support.shards import read_dicts, write_dicts

# -- determinism and resume


def test_one_seed_gives_the_same_weights_bit_for_bit(tmp_path):
    runs = []
    for seed in (0, 0, 1):
        module = make_module(seed, caption_dropout=0.2)
        fit(module, make_data(seed), tmp_path, steps=3)
        runs.append(weights(module))
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


@pytest.mark.parametrize(("lora", "workers"), [(None, 0), (LoRA(rank=2, dropout=0.3), 2)], ids=["full", "lora"])
def test_resumed_run_ends_with_the_weights_of_the_unbroken_one(tmp_path, workers, lora):
    """Mid-epoch and across an epoch's end (26 batches), with accumulation and prefetching workers."""
    options = {"accumulate_grad_batches": 2}
    data = {"num_workers": workers, "batch_size": 4}  # 13 batches an epoch
    whole, recorder = make_module(lora=lora, caption_dropout=0.2), Recorder()
    fit(whole, make_data(**data), tmp_path, steps=9, callbacks=[recorder], **options)
    assert len(recorder.pairs) == 18 - 1  # 13 batches make 7 steps, the last of one batch

    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    killed = make_module(lora=lora, caption_dropout=0.2)
    fit(killed, make_data(**data), tmp_path, steps=8, callbacks=[checkpoint], **options)
    for step, consumed in ((3, 6), (8, 15)):
        resumed, rest = make_module(lora=lora, caption_dropout=0.2), Recorder()
        path = tmp_path / f"step={step}.ckpt"
        fit(resumed, make_data(**data), tmp_path, steps=9, ckpt_path=path, callbacks=[rest], **options)
        assert rest.pairs == recorder.pairs[consumed:]
        assert equal(weights(resumed), weights(whole))


def test_resume_at_the_end_of_an_epoch_begins_the_next(tmp_path):
    whole, recorder = make_module(), Recorder()
    fit(whole, make_data(batch_size=13), tmp_path, steps=6, callbacks=[recorder])  # 4 batches an epoch
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(make_module(), make_data(batch_size=13), tmp_path, steps=4, callbacks=[checkpoint])
    resumed, rest = make_module(), Recorder()
    fit(resumed, make_data(batch_size=13), tmp_path, 6, ckpt_path=tmp_path / "step=4.ckpt", callbacks=[rest])
    assert rest.pairs == recorder.pairs[4:]
    assert equal(weights(resumed), weights(whole))


# -- what is saved


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_save_at_the_last_batch_of_an_epoch_too(config, tmp_path):
    """Lightning 2.6 puts such a save off until a validation, which may not come, but for save_on_train_epoch_end."""
    callbacks = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    (settings,) = [c["init_args"] for c in callbacks if c["class_path"].endswith(".ModelCheckpoint")]
    assert settings["save_on_train_epoch_end"]
    if config.stem == "quickstart":  # the others differ in numbers alone
        checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, **(settings | {"every_n_train_steps": 2}))
        options = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
        fit(
            make_module(), make_data(batch_size=13), tmp_path, 4, callbacks=[checkpoint], **options
        )  # 4 batches an epoch
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_checkpoint_holds_only_what_was_trained(tmp_path):
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True)
    module = make_module(lora=LoRA(rank=2))
    fit(module, make_data(), tmp_path, steps=2, callbacks=[checkpoint])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"backbone.{name}" for name in module.backbone.trainable_parameters()}
    assert all(".lora_" in name for name in saved["state_dict"])
    assert saved["global_step"] == 2
    assert saved["lit_align"]["lora"]["rank"] == 2
    assert len(saved["optimizer_states"]) == 1

    with pytest.raises(ValueError, match=r"32 trained weights are missing|trained weights are missing"):
        fit(make_module(), make_data(), tmp_path, steps=3, ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="began with seed_everything 0, not 5"):
        fit(make_module(5, LoRA(rank=2)), make_data(5), tmp_path, steps=3, ckpt_path=tmp_path / "last.ckpt")


# -- the step


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
    """With chosen and rejected the same image, both errors are the same number, whatever was drawn."""
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


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_other_backbones_train(tmp_path, request, kind):
    module = make_module(repo=request.getfixturevalue(kind), backbone=StableDiffusion, objective=SFT())
    trainer = fit(module, make_data(batch_size=4), tmp_path, steps=3, log_every_n_steps=3)
    assert 0.5 < trainer.callback_metrics["train/loss"] < 3  # an untrained UNet on targets of unit variance


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_half_precision_trains(tmp_path, precision, lora):
    """Images, sizes, the VAE and the errors keep their precision."""
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


# -- validation and logs


def test_validation_gives_the_same_number_every_time(tmp_path):
    """Whatever the batch size, the number of workers and the random state are."""
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


def test_weighted_means_over_updates_and_ranks():
    metric = WeightedMeans(["a", "b"])
    metric.update({"a": (torch.tensor([1.0, 3.0]), torch.ones(2)), "b": (torch.tensor([5.0]), torch.zeros(1))}
                  | {"b": (torch.tensor([5.0, torch.nan]), torch.zeros(2))})  # fmt: skip
    metric.update({"a": (torch.tensor([7.0, 100.0]), torch.tensor([1.0, 0.0])), "b": (torch.zeros(2), torch.zeros(2))})
    result = metric.compute()
    assert result == {"a": pytest.approx(11 / 3)}


def test_errors_by_timestep_range_and_ties_of_accuracy():
    metrics = PreferenceMetrics([], timesteps=1000)
    errors = PairErrors(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 2.0, 2.0]))
    output = ObjectiveOutput(torch.tensor([3.0, 5.0, 7.0]), torch.tensor([1.0, 0.0, -1.0]), {})
    pairs = SimpleNamespace(weight=torch.ones(3), voted=False, vote_share=torch.zeros(3), human=torch.ones(3))
    metrics.observe(output, errors, torch.tensor([0, 249, 250]), pairs)
    result = metrics.compute()
    assert result["loss"] == 5
    assert result["loss/t0-249"] == 4
    assert result["loss/t250-499"] == 7
    assert result["chosen_error/t0-249"] == 1.5
    assert result["chosen_error/t250-499"] == 4
    assert "chosen_error/t500-749" not in result
    assert result["accuracy"] == 0.5
    assert implicit_accuracy(torch.tensor([2.0, 0.0, -1.0])).tolist() == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_dropout": 1.2}, "model.caption_dropout is 1.2"),
        ({"validation_draws": 0}, "model.validation_draws is 0"),
    ],
)
def test_senseless_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_module(**options)
