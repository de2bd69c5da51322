"""`lit-align fit` and `lit-align validate`: training and its validation through LightningCLI."""

import sys
from typing import Any, TypeVar

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lit_align.backbones
import lit_align.objectives  # noqa: F401  # imported so that short class names resolve
from lit_align.backbones.loading.meta import load_frozen_in
from lit_align.callbacks import DivergenceGuard, Preemption
from lit_align.callbacks.defaults import default_callbacks, without_rivals
from lit_align.callbacks.preemption import ctrl_c_code, requeue_on_usr1
from lit_align.commands.shared.announced_checkpoint import choose_checkpoint
from lit_align.commands.shared.command_line import ShortErrors
from lit_align.commands.shared.launchers import seat_of
from lit_align.common.files import write_text
from lit_align.data import PreferenceDataModule
from lit_align.data.cache.reader import Cache
from lit_align.internals import is_lightning_child
from lit_align.training.checkpoints.atomic_io import AtomicCheckpointIO, check_writable
from lit_align.training.checkpoints.folder_owner import check_folder_is_own
from lit_align.training.checkpoints.last_checkpoint import checkpoint_folders, refuse_last_at_addresses
from lit_align.training.checkpoints.run_folder import (
    CONFIG,
    RunFolder,
    experiment_folder,
    keep_metrics,
    run_folder,
)
from lit_align.training.checkpoints.run_record import RunRecord
from lit_align.training.checkpoints.settings import flat, put
from lit_align.training.config_checks import choose_versions, inherited_init_args, integer_seed
from lit_align.training.module import AlignmentModule
from lit_align.training.precisions import compute_dtype
from lit_align.training.strategy_checks import check_strategy, name_of
from lit_align.training.trainer_checks import check_options
from lit_align.types import CacheOrigin
from lit_align.user_errors import UserError, UserValueError


class Parser(ShortErrors, LightningArgumentParser):
    """Parser of training configs."""


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` when training begins, so that a run that is refused leaves the file of the earlier run."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write nothing yet, and nothing at all in a validation: only `fit` writes into a run."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, AlignmentModule)
        folder = run_folder(trainer)  # asked of all ranks
        if trainer.is_global_zero:
            write_text(folder / CONFIG, config_text(self.parser, self.config, pl_module.run_record))


def config_text(parser: LightningArgumentParser, config: Namespace, record: RunRecord) -> str:
    """Write a run's config with the values that it trains with, and those it had before as comments."""
    text: str = parser.dump(config, skip_none=False)
    if record.kept:
        plain = yaml.safe_load(text)
        put(plain, record.kept)
        text = yaml.safe_dump(plain, sort_keys=False)
    before = ["# Settings that changed when the run was resumed:", *(f"# {change}" for change in record.history)]
    return "\n".join([*(before if record.history else []), text])


class AlignmentCLI(LightningCLI):
    """LightningCLI for our module and data, with one seed for everything."""

    description = "Align text-to-image diffusion models with preference pairs."
    example = "--config configs/mapo_sdxl.yaml --config configs/hardware/one_24gb.yaml --trainer.max_steps 1000"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Our own options come first in --help, before the long list of the Trainer's.
        groups: Any = parser._action_groups  # a list, typed as a sequence
        groups.sort(key=lambda group: (group.title or "").startswith("Customize every aspect"))
        parser.link_arguments("seed_everything", "model.seed", compute_fn=integer_seed)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=integer_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # Lightning would warn that sys.argv has other arguments

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        if self.subcommand:
            check_strategy(name_of(config.trainer.strategy))
            check_options(config.trainer)
        for warning in inherited_init_args(config):
            rank_zero_info(warning)
        self.trainer_defaults["callbacks"] = without_rivals(default_callbacks(), config.trainer)
        if config.get("ckpt_path") == "last":
            choose_versions(config.trainer)

    def instantiate_classes(self) -> None:
        """Load frozen weights in the compute precision, without the memory for them in float32."""
        with load_frozen_in(compute_dtype(self.config[self.subcommand].trainer.precision)):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add our CheckpointIO, unless the config names one.

        Raises:
            ValueError: if the Trainer refuses its options.
            RuntimeError: in a batch script of SLURM with several tasks, without srun.
        """
        trainer = self.config_init[self.subcommand].trainer
        given = trainer.plugins or []
        plugins = given if isinstance(given, list) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        try:
            made = super().instantiate_trainer(plugins=plugins, **kwargs)
        except UserError:
            raise
        except (ImportError, MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
            raise UserValueError(f"trainer: {error}") from error
        if isinstance(getattr(made.strategy, "cluster_environment", None), SLURMEnvironment):
            seat_of()  # a run that srun has not started would wait for the other tasks
        return made

    def before_fit(self) -> None:
        """Replace `--ckpt_path last` by the path of the last complete checkpoint, or by none to start from step 0."""
        self._check_caches()
        fit, folder = self.config_init.fit, self._folder()
        self.model.run_record.config = config = self._settings("fit")
        if fit.ckpt_path == "last":
            refuse_last_at_addresses(self.trainer)
        folder.decide(self.trainer, fit.ckpt_path == "last", config)
        folders = checkpoint_folders(self.trainer)
        fit.ckpt_path = choose_checkpoint(folders, fit.ckpt_path, or_begin=True)
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # which writes nothing
            self.model.run_record.fork = not check_folder_is_own(folders, fit.ckpt_path)
        if self.trainer.checkpoint_callbacks and self.trainer.is_global_zero:
            check_writable(folders[0] if folder.path else experiment_folder(self.trainer))
        keep_metrics(self.trainer)

    def before_validate(self) -> None:
        """Find the checkpoint, and take the loggers away: only `fit` writes into a run, and values are printed."""
        options = self.config_init.validate
        if options.ckpt_path == "last":
            refuse_last_at_addresses(self.trainer)
        self._folder().find(self.trainer, options.ckpt_path == "last", self._settings("validate"))
        options.ckpt_path = choose_checkpoint(checkpoint_folders(self.trainer), options.ckpt_path, or_begin=False)
        self.trainer.loggers = []

    def _folder(self) -> RunFolder:
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set in its constructor
        (folder,) = (callback for callback in callbacks if isinstance(callback, RunFolder))
        return folder

    def _settings(self, subcommand: str) -> dict[str, Any]:
        """Return the settings of this run by option."""
        return flat(yaml.safe_load(self._parser(subcommand).dump(self.config[subcommand], skip_none=False)))

    def _check_caches(self) -> None:
        """Refuse caches of other encoders before callbacks generate images; Python users meet it at the first batch."""
        for split in (self.datamodule.train, self.datamodule.val):
            if split is not None and split.cache is not None:
                encoders = Cache.open(split.cache).fingerprint["encoders"]
                self.model.backbone.check_origin(CacheOrigin(split.cache, encoders))

    @property
    def exit_code(self) -> int:
        """Exit code; non-zero after a signal, and where the run was stopped because it diverged.

        A child process of Lightning exits with 0: Lightning would kill the parent, which may still have to write.
        """
        if is_lightning_child(self.trainer.strategy):
            return 0
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set in Trainer's constructor
        return max((c.exit_code for c in callbacks if isinstance(c, Preemption | DivergenceGuard)), default=0)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        return {"fit": skipped, "validate": skipped}


class ConfigCLI(AlignmentCLI):
    """Parses the config of a training run without instantiating it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None, help="checkpoint from which the run would resume")
        parser.add_argument(
            "--weights_only", type=bool | None, help="accepted because configs of runs have it; not used"
        )

    def _set_seed(self) -> None:
        """Leave the global seed alone: nothing here is random."""

    def instantiate_classes(self) -> None:
        """Instantiate nothing."""


CLI = TypeVar("CLI", bound=AlignmentCLI)


def fit(words: list[str]) -> None:
    """Train; `words` follow `fit` on the command line."""
    _run("fit", words)


def validate(words: list[str]) -> None:
    """Validate a checkpoint on held-out pairs; `words` follow `validate` on the command line."""
    _run("validate", words)


def _run(subcommand: str, words: list[str]) -> None:
    requeue_on_usr1()
    with ctrl_c_code():
        code = make_cli(AlignmentCLI, [subcommand, *words], run=True, prog="lit-align").exit_code
    if code:
        sys.exit(code)


def make_cli(kind: type[CLI], words: list[str], run: bool, prog: str) -> CLI:
    """Make a LightningCLI of our module and data module, with our default callbacks."""
    return kind(
        AlignmentModule,
        PreferenceDataModule,
        args=words,
        run=run,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        trainer_defaults={
            "callbacks": default_callbacks(),
            "enable_model_summary": False,  # the banner says it
            "num_sanity_val_steps": -1,  # all held-out pairs: the start that later errors are compared with
        },
        save_config_callback=SaveConfig,
        parser_class=Parser,
        parser_kwargs={"prog": prog} | {name: _help(f"{prog} {name}", kind) for name in kind.subcommands()}
        if run
        else _help(prog, kind),
    )


def _help(prog: str, kind: type[AlignmentCLI]) -> dict[str, Any]:
    usage = f"{prog} --config FILE [--config OVERLAY ...] [--KEY VALUE ...]\n\nexample: {prog} {kind.example}"
    return {"prog": prog, "usage": usage, "description": kind.description}
