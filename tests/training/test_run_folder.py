"""Each run has a folder of its own, whatever its logger, and `last` finds it."""

import os

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_align.__main__ import main
from lit_align.training.checkpoints.folder_owner import check_folder_is_own
from lit_align.training.checkpoints.last_checkpoint import checkpoint_folders, refuse_last_at_addresses
from lit_align.training.checkpoints.run_folder import RunFolder, keep_metrics, last_run, run_folder
from lit_align.training.checkpoints.settings import flat
from lit_align.training.config_checks import choose_versions
from tests.support.online_logger import OnlineLogger


def make_trainer(folder, logger):
    """Make a Trainer that has not begun."""
    callbacks = [RunFolder(), ModelCheckpoint()]
    options = {"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": folder}
    return L.Trainer(logger=logger, callbacks=callbacks, **options)


def begin(trainer, last=False, config=None):
    """Decide the folder of a run as `fit` does, and return it."""
    decided, saved = trainer.callbacks[0], trainer.checkpoint_callbacks[0]
    decided.decide(trainer, last, config or {})
    for logger in trainer.loggers:
        _ = logger.experiment  # as Lightning before `setup`
    decided.setup(trainer, None, "fit")
    folder = run_folder(trainer)
    assert saved.dirpath == str(folder / "checkpoints")
    assert checkpoint_folders(trainer)[-1] == folder / "checkpoints"
    return folder


def save(folder, step=1, name="first", **entries):
    """Write a small checkpoint."""
    path = folder / f"checkpoints/step={step}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"lit_align": {"run": {"name": name}}} if name else {}
    torch.save({"global_step": step, "optimizer_states": [], "lr_schedulers": [], **record, **entries}, path)
    return path


@pytest.mark.parametrize(
    ("logger", "expected"),
    [
        (lambda folder: TensorBoardLogger(folder, "mapo"), "mapo/version_0"),
        (lambda folder: TensorBoardLogger(folder, "mapo", version=""), "mapo"),
        (lambda folder: CSVLogger(folder, "mapo"), "mapo/version_0"),
        (lambda folder: True, "lightning_logs/version_0"),
        (lambda folder: [CSVLogger(folder, "a"), CSVLogger(folder, "b")], "a/version_0"),
        (lambda folder: False, "version_0"),
    ],
)
def test_a_run_has_the_folder_of_its_logger_or_a_number(tmp_path, logger, expected):
    assert begin(make_trainer(tmp_path, logger(tmp_path))) == tmp_path / expected


def test_runs_of_a_service_do_not_share_a_folder_and_last_finds_the_one_of_its_words(tmp_path):
    first, second = (begin(make_trainer(tmp_path, OnlineLogger(str(tmp_path), "ours"))) for _ in range(2))
    assert {first.parent, second.parent} == {tmp_path / "ours"}
    assert first != second
    words = {}
    for name in ("first", "second"):
        logger = {"class_path": "tests.OnlineLogger", "init_args": {"project": "ours", "name": name}}
        words[name] = {"trainer": {"logger": logger}}
    for number, (folder, name) in enumerate([(first, "first"), (second, "second")]):
        path = save(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(words[name]))
        os.utime(path, (number, number))
    assert last_run(tmp_path / "ours", flat(words["second"])) == second
    resumed = make_trainer(tmp_path, OnlineLogger(str(tmp_path), "ours"))
    assert begin(resumed, last=True, config=flat(words["first"])) == first
    words["first"]["trainer"]["logger"]["init_args"] |= {"offline": True, "tags": ["again"]}
    assert last_run(tmp_path / "ours", flat(words["first"])) == first


def test_runs_without_a_logger_are_numbered(tmp_path):
    first, second = (begin(make_trainer(tmp_path, False)) for _ in range(2))
    assert (first, second) == (tmp_path / "version_0", tmp_path / "version_1")
    save(first)
    assert begin(make_trainer(tmp_path, False), last=True) == first


def test_a_validation_finds_the_last_run_and_makes_no_folder(tmp_path):
    trainer = make_trainer(tmp_path, False)
    trainer.callbacks[0].find(trainer, True, {})
    assert list(tmp_path.iterdir()) == []
    save(tmp_path / "version_4")
    trainer.callbacks[0].find(trainer, True, {})
    assert checkpoint_folders(trainer) == [tmp_path / "version_4/checkpoints"]


def test_a_run_of_an_earlier_version_without_a_logger_is_found(tmp_path):
    save(tmp_path)
    assert begin(make_trainer(tmp_path, False), last=True) == tmp_path


def test_last_numbers_lightning_s_own_logger_and_each_of_several(tmp_path):
    save(tmp_path / "lightning_logs/version_3")
    trainer = Namespace(logger=None, default_root_dir=str(tmp_path))
    choose_versions(trainer)
    assert trainer.logger.class_path == "lightning.pytorch.loggers.TensorBoardLogger"
    assert trainer.logger.init_args.version == 3
    init_args = {"save_dir": str(tmp_path), "name": "lightning_logs", "version": None}
    several = [Namespace(class_path="CSVLogger", init_args=Namespace(init_args)) for _ in range(2)]
    choose_versions(Namespace(logger=several, default_root_dir=None))
    assert [logger.init_args.version for logger in several] == [3, 3]
    fresh = Namespace(logger=True, default_root_dir=str(tmp_path / "other"))
    choose_versions(fresh)
    assert fresh.logger is True


def test_last_is_refused_where_all_checkpoints_go_to_addresses(tmp_path):
    remote, local = ModelCheckpoint("memory://runs", every_n_epochs=2), ModelCheckpoint()
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[remote], default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="last looks on disks alone, and ModelCheckpoint's dirpath is memory://runs"):
        refuse_last_at_addresses(trainer)
    assert checkpoint_folders(trainer) == [tmp_path / "checkpoints"]
    both = L.Trainer(accelerator="cpu", logger=False, callbacks=[remote, local], default_root_dir=tmp_path)
    refuse_last_at_addresses(both)


def test_metrics_of_a_run_that_goes_on_are_kept(tmp_path):
    for number in (1, 2):
        trainer = make_trainer(tmp_path, CSVLogger(tmp_path, "", ""))
        keep_metrics(trainer)
        trainer.logger.log_metrics({"loss": number}, 1)
        trainer.logger.save()
    assert (tmp_path / "metrics-1.csv").read_text().splitlines() == ["loss,step", "1,1"]
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["loss,step", "2,1"]


def test_a_folder_has_one_run(tmp_path):
    folders = [tmp_path / "checkpoints"]
    check_folder_is_own(folders, None)
    first, third = save(tmp_path, 1), save(tmp_path, 3)
    check_folder_is_own(folders, str(third))
    with pytest.raises(ValueError, match=r"holds checkpoints of a run, such as step=1\.ckpt, and a new run would mix"):
        check_folder_is_own(folders, None)
    with pytest.raises(ValueError, match=r"of step 1, and .*step=3\.ckpt of step 3: a run that goes on"):
        check_folder_is_own(folders, str(first))
    elsewhere = save(tmp_path / "b", 2, "second")
    with pytest.raises(ValueError, match=r"step=1\.ckpt is of another run than ckpt_path"):
        check_folder_is_own(folders, str(elsewhere))
    check_folder_is_own([tmp_path / "new"], str(elsewhere))
    check_folder_is_own(folders, str(save(tmp_path / "old", 4, None)))  # of an earlier version: unknown


def test_fit_writes_all_files_of_a_run_into_its_folder_and_validate_none(tmp_path, capsys):
    words = [
        "--config=configs/quickstart.yaml",
        "--trainer.logger=tests.support.online_logger.OnlineLogger",
        f"--trainer.logger.save_dir={tmp_path}",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.limit_val_batches=1",
        "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=1",
        "--data.batch_size=2",
    ]
    main(["fit", *words, "--trainer.max_steps=1"])
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    assert {path.name for path in folder.iterdir()} == {"checkpoints", "config.yaml"}
    main(["fit", *words, "--trainer.max_steps=2", "--ckpt_path=last", "--model.optimizer.lr=1e-6"])
    config = folder / "config.yaml"
    assert yaml.safe_load(config.read_text())["model"]["optimizer"]["init_args"]["lr"] == 1e-4  # what it trains with
    assert "# step 1: trainer.max_steps was 1, is 2" in config.read_text()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    checkpoint = folder / "checkpoints/epoch=0-step=2.ckpt"
    assert checkpoint in before
    main(["validate", f"--config={config}", f"--ckpt_path={checkpoint}", "--data.batch_size=4"])
    assert "val/loss" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
