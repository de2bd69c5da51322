"""The win rate during training: correct, available at every save, equal after a resume; the run is unchanged."""

import lightning as L
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_align.backbones import LoRA
from lit_align.backbones.sampling import generate
from lit_align.callbacks import Throughput, WinRate
from lit_align.cli import main
from lit_align.evaluation.prompts import prompt_seed
from lit_align.evaluation.win_rates import compare
from lit_align.scoring import Aesthetic, Colourfulness, Scorer, Sharpness
from tests.support.paths import PAIRS, PIPELINE, ROOT
from tests.support.processes import fork_ranks
from tests.support.runs import KeepLogs, equal, fit, make_data, make_module, weights

STYLE = ROOT / "assets/emoji/scorers/style"
PROMPTS = ["fox", "tulip", "cactus"]


def win_rate(prompts=PROMPTS, scorers=None, **changes):
    scorers = scorers or {"style": Aesthetic(str(STYLE)), "colour": Colourfulness()}
    return WinRate(prompts, scorers, **{"every_n_steps": 2, "height": 32, "width": 32, "steps": 2, **changes})


def scores(module, callback):
    """Score the model's current images as the callback does."""
    images = [generate(module.backbone, [p], [prompt_seed(p, 0)], 32, 32, steps=2) for p in callback.prompts]
    pairs = list(zip(images, callback.prompts, strict=True))  # a batch would change the last digits
    return {name: torch.cat([s.score(image, [p]) for image, p in pairs]) for name, s in callback.scorers.items()}


def best(folder, monitor="win_rate/macro", **changes):
    settings = {"every_n_train_steps": 2, "mode": "max", "save_on_train_epoch_end": True, "filename": "best-{step}"}
    return L.pytorch.callbacks.ModelCheckpoint(folder, monitor=monitor, **(settings | changes))


class Modes(L.Callback):
    """Records modes, random state and encoders at the start of each training step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        modes = [module.training for module in pl_module.modules()]
        self.seen.append((modes, torch.get_rng_state(), torch.is_grad_enabled(), set(pl_module.backbone._modules)))


def test_it_changes_nothing_in_the_run(tmp_path):
    runs = []
    for callbacks in ([], [win_rate(every_n_steps=1)]):
        module, modes = make_module(lora=LoRA(rank=2, dropout=0.3), caption_dropout=0.2), Modes()
        fit(module, make_data(), tmp_path, steps=3, callbacks=[*callbacks, modes])
        runs.append((weights(module), torch.get_rng_state(), modes.seen, set(module.state_dict())))
    assert equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][3] == runs[1][3]  # no scorer in the module
    for first, second in zip(runs[0][2], runs[1][2], strict=True):
        assert first[0] == second[0]
        assert torch.equal(first[1], second[1])
        assert first[2:] == second[2:]


def test_it_logs_what_compare_finds(tmp_path):
    """Once at each multiple, also at steps that the Trainer does not log, and at the end."""
    module, callback, logger = make_module(), win_rate(tolerances={"style": 0.01}), KeepLogs()
    before = scores(module, callback)
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 3}
    trainer = fit(module, make_data(), tmp_path, 5, callbacks=[callback], logger=logger, **options)
    after = scores(module, callback)
    expected = compare(after, before, {"style": 0.01})
    assert all(torch.equal(callback.base[name], value) for name, value in before.items())
    rows = [(step, row) for step, row in logger.rows if "win_rate/macro" in row]
    assert [step for step, _ in rows] == [2, 4, 5]
    assert rows[-1][1] == {
        "win_rate/style": expected.scorers["style"].win_rate,
        "win_rate/colour": expected.scorers["colour"].win_rate,
        "win_rate/macro": expected.macro,
        "win_rate/macro_low": expected.macro_interval.low,
        "win_rate/macro_high": expected.macro_interval.high,
        "score_vs_base/style": expected.scorers["style"].difference,
        "score_vs_base/colour": expected.scorers["colour"].difference,
    }
    assert expected.scorers["style"].difference != 0
    for name, value in rows[-1][1].items():
        assert trainer.callback_metrics[name].item() == pytest.approx(value)


class Made(Scorer):
    """Returns a given score for each measurement, the base's first."""

    version = 1

    def __init__(self, values):
        super().__init__()
        self.values, self.prompts = list(values), 0

    def _score(self, images, prompts):
        self.prompts += 1
        return torch.tensor([self.values[(self.prompts - 1) // len(PROMPTS)]])


def test_the_best_checkpoint_is_kept(tmp_path):
    """A step is measured before it is saved: differences are -1, 3, 2 at steps 2, 4, 6."""
    module, callback = make_module(lora=LoRA(rank=2)), win_rate(scorers={"made": Made([0, -1, 3, 2])})
    checkpoint = best(tmp_path, "score_vs_base/made")
    validations = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    seen = {}

    class See(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen[trainer.global_step] = weights(pl_module)

    data = make_data(batch_size=13)  # 4 batches an epoch: step 4 is the last
    fit(module, data, tmp_path, 6, callbacks=[checkpoint, callback, See()], **validations)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["best-step=4.ckpt"]
    assert checkpoint.best_model_score == 3
    kept = torch.load(checkpoint.best_model_path, weights_only=True)
    assert equal({name.removeprefix("backbone."): value for name, value in kept["state_dict"].items()}, seen[4])


def test_resumed_run_measures_as_the_unbroken_one(tmp_path):
    """Resume between two measurements; the last values are available before the next one."""
    whole_logs, rest = KeepLogs(), KeepLogs()
    lora = LoRA(rank=2)
    fit(make_module(lora=lora), make_data(), tmp_path, 5, callbacks=[win_rate()], logger=whole_logs)
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_last=True)
    first = win_rate()
    fit(make_module(lora=lora), make_data(), tmp_path, 3, callbacks=[first, checkpoint])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if "scorer" in name]
    assert saved["callbacks"]["WinRate"]["measured_at"] == 2
    found = {}

    class See(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found.setdefault(trainer.global_step, dict(trainer.callback_metrics))

    second, last = win_rate(), tmp_path / "last.ckpt"
    fit(make_module(lora=lora), make_data(), tmp_path, 5, last, callbacks=[second, See()], logger=rest)
    assert found[3]["win_rate/macro"].item() == pytest.approx(saved["callbacks"]["WinRate"]["values"]["win_rate/macro"])
    measured = [[row for row in logs.rows if "win_rate/macro" in row[1]] for logs in (whole_logs, rest)]
    assert measured[1] == measured[0][1:]
    assert [step for step, _ in measured[1]] == [4, 5]
    for changes, culprit in (({"seed": 1}, "seed"), ({"scorers": {"style": Sharpness()}}, "scorers")):
        with pytest.raises(ValueError, match=f"cannot score the base at step 3.* another value of {culprit}"):
            fit(make_module(lora=lora), make_data(), tmp_path, 5, last, callbacks=[win_rate(**changes)])


def test_the_clock_is_paused_and_scorers_end_on_the_cpu(tmp_path):
    clock, standing = Throughput(), []

    class Watched(Made):
        def _score(self, images, prompts):
            standing.append(clock.resumed_at is None)
            return super()._score(images, prompts)

    callback = win_rate(["fox"], scorers={"made": Watched([0.0] * 9), "style": Aesthetic(str(STYLE))})
    fit(make_module(), make_data(), tmp_path, 3, callbacks=[callback, clock])
    assert standing == [True, True, True]  # the base, step 2, step 3
    assert callback.scorers["style"].device == torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"monitor": "win_rate/clip"}, "monitor is 'win_rate/clip'; WinRate logs win_rate/style"),
        ({"mode": "min"}, r"mode is 'min'.* Set max"),
        ({"every_n_train_steps": 3}, r"every_n_train_steps is 3, but WinRate measures every 2 steps"),
        ({"every_n_train_steps": None, "every_n_epochs": 1}, r"every_n_train_steps is 0"),
        ({"save_on_train_epoch_end": None}, "save_on_train_epoch_end must be true"),
    ],
)
def test_a_checkpoint_that_would_choose_wrongly_is_refused(tmp_path, changes, message):
    trainer = L.Trainer(callbacks=[best(tmp_path, **changes)], accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match=message):
        win_rate().setup(trainer, None, "fit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["fox", "rose", "fox"]}, "has 'fox' twice"),
        ({"every_n_steps": 0}, "every_n_steps is 0"),
        ({"tolerances": {"clip": 0.1}}, "'clip' is not a scorer here; choose from style, colour"),
        ({"tolerances": {"style": -1.0}}, r"tolerances\.style is -1"),
        ({"scorers": {"macro": Sharpness()}}, "'macro' is the name of their mean"),
    ],
)
def test_bad_options_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        win_rate(**changes)


CONFIG = f"""
trainer:
  accelerator: cpu
  max_steps: 2
  num_sanity_val_steps: 0
  limit_val_batches: 0
  log_every_n_steps: 50
  logger: {{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {{save_dir: FOLDER, name: "", version: ""}}}}
  callbacks:
    - class_path: lit_align.callbacks.WinRate
      init_args:
        prompts: FOLDER/prompts.csv
        scorers:
          style: {{class_path: lit_align.scoring.Aesthetic, init_args: {{repo: {STYLE}}}}}
          colour: {{class_path: lit_align.scoring.Colourfulness}}
        every_n_steps: 1
        height: 32
        width: 32
        steps: 2
        tolerances: {{style: 0.4}}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{every_n_train_steps: 1, monitor: win_rate/macro, mode: max, filename: "best-{{step}}", save_on_train_epoch_end: true}}
model:
  backbone: {{class_path: lit_align.backbones.StableDiffusionXL, init_args: {{repo: {PIPELINE}}}}}
  objective: lit_align.objectives.MaPO
data: {{train_shards: {PAIRS}/train/00000.tar, resolution: 32, batch_size: 2, num_workers: 0}}
"""  # noqa: E501


def test_command_line_reads_and_keeps_the_scorers(tmp_path):
    config = tmp_path / "given.yaml"
    config.write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    (tmp_path / "prompts.csv").write_text("prompt\nfox\ntulip\n")
    main(["fit", f"--config={config}"])
    kept = yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["callbacks"][0]["init_args"]
    assert kept["prompts"] == f"{tmp_path}/prompts.csv"
    assert kept["scorers"]["style"] == {
        "class_path": "lit_align.scoring.Aesthetic",
        "init_args": {
            "repo": str(STYLE),
            **{k: v for k, v in kept["scorers"]["style"]["init_args"].items() if k != "repo"},
        },
    }
    assert kept["tolerances"] == {"style": 0.4}
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in events.Scalars("win_rate/macro")] == [1, 2]
    assert list(tmp_path.rglob("best-step=*.ckpt"))


def test_two_processes_find_what_one_does(tmp_path):
    """Three prompts on two ranks; both hold all scores, equal to those of one process with these weights."""

    def run():
        module, callback = make_module(), win_rate()
        trainer = fit(module, make_data(), tmp_path, 2, callbacks=[callback], devices=2, strategy="ddp")
        metrics = {name: value for name, value in trainer.callback_metrics.items() if "/" in name}
        after = callback._scores(trainer, trainer.lightning_module)
        torch.save([metrics, callback.base, after], tmp_path / f"rank{trainer.global_rank}.pt")
        torch.save(module.backbone.denoiser.state_dict(), tmp_path / f"weights{trainer.global_rank}.pt")

    fork_ranks(run)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    module, callback = make_module(), win_rate()
    for part, expected in ((1, scores(module, callback)), (2, None)):
        if expected is None:
            module.backbone.denoiser.load_state_dict(torch.load(tmp_path / "weights0.pt", weights_only=True))
            expected = scores(module, callback)
        for rank in (first, second):
            for name, values in expected.items():
                assert torch.allclose(rank[part][name], values, atol=1e-4)
    assert first[0].keys() == second[0].keys() > {"win_rate/macro", "win_rate/style"}
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())
