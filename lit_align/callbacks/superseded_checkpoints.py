"""Keeps `last.ckpt` at the newest checkpoint over kills, and removes files that a kill has left behind."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.callbacks.preemption import NAME
from lit_align.internals import replace_link
from lit_align.training.checkpoints.last_checkpoint import last_checkpoint, resumable_step
from lit_align.training.checkpoints.last_link import LAST, link
from lit_align.training.checkpoints.plain_state import make_plain
from lit_align.training.steps import at_step


class SupersededCheckpoints(L.Callback):
    """Corrects what ModelCheckpoint does with `last.ckpt` and with old files where a run was killed and resumed.

    ModelCheckpoint knows `last.ckpt` only from the checkpoint that it resumes from. The first one does not name it, so
    that the resumed run would write `last-v1.ckpt` and leave `last.ckpt` as it was. It deletes an old file after a
    save, so that a kill in between leaves it for good, and never the file that the run has resumed from. Here each
    checkpoint names the files that it replaces, `preempted.ckpt` too, and they go once a newer one lies beside them.

    It also checks after the first step that the state of all callbacks can be saved, see `make_plain`.
    """

    def __init__(self) -> None:
        self.superseded: set[str] = set()
        self._kept: set[str] = set()  # files that ModelCheckpoint keeps
        self._checkpoints: list[ModelCheckpoint] = []
        self._saved = self._checked = False  # since the last look, since the start

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = self._checked = False
        found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        self._checkpoints = [c for c in found if "://" not in str(c.dirpath)]  # at an address all stay as they are
        for checkpoint in self._checkpoints:
            replace_link(checkpoint, link)
        self._go_on(trainer)  # here, because a run with no steps left has no `on_train_start`

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.strategy.restore_checkpoint_after_setup:  # sharded: states of callbacks come after `on_fit_start`
            self._go_on(trainer)

    def _go_on(self, trainer: L.Trainer) -> None:
        """Correct files and ModelCheckpoint where the run resumes."""
        self._kept = self._files()
        if trainer.ckpt_path is not None:
            if trainer.is_global_zero:
                self._remove_superseded()
            self._link_last(Path(trainer.ckpt_path).resolve(), trainer.is_global_zero)
        trainer.strategy.barrier()

    def _link_last(self, resumed: Path, writes: bool) -> None:
        """Let `last.ckpt` link to the checkpoint that the run resumes from, and ModelCheckpoint go on with it.

        Only one device writes, but each must know the name: one that does not would ask the others for it.
        """
        for checkpoint in self._checkpoints:
            folder = Path(str(checkpoint.dirpath))
            last = folder / f"{checkpoint.CHECKPOINT_NAME_LAST}{checkpoint.FILE_EXTENSION}"
            if not checkpoint.save_last or last.name != LAST:
                continue
            checkpoint.last_model_path = str(last)
            if not writes:
                continue
            for stray in folder.glob("last-v*.ckpt"):  # of runs without this callback
                if stray.is_symlink():
                    stray.unlink()
            if resumed.parent == folder.resolve() and resumed.name != LAST:
                link(resumed, last)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._look(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._checked or not at_step(trainer) or not trainer.checkpoint_callbacks:
            return
        self._checked = True
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set in Trainer's constructor
        others = [callback for callback in callbacks if callback is not self]
        make_plain({"callbacks": {callback.state_key: callback.state_dict() for callback in others}})

    def _look(self, trainer: L.Trainer) -> None:
        if self._saved and trainer.is_global_zero:
            self._remove_superseded()
        self._saved = False

    def _remove_superseded(self) -> None:
        """Remove files beside which a newer checkpoint lies, from which a run can resume."""
        folders = {Path(str(checkpoint.dirpath)).resolve() for checkpoint in self._checkpoints}
        for path in map(Path, self.superseded):
            if not path.exists() or path.resolve().parent not in folders:  # in the folder that this run was copied from
                continue
            step, newest = resumable_step(path), last_checkpoint([path.parent])
            if step is None or newest is None or newest.step <= step:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _files(self) -> set[str]:
        """List the files that ModelCheckpoint keeps and will delete, and the one of an earlier preemption."""
        files: set[str] = set()
        for checkpoint in self._checkpoints:
            if checkpoint.save_top_k > 0:
                files |= {*checkpoint.best_k_models, checkpoint.best_model_path}
        return files - {""}

    def state_dict(self) -> dict[str, Any]:
        """Name the files that the checkpoint replaces, for which this is called."""
        kept, self._saved = self._files(), True
        passing = {str(Path(str(c.dirpath), NAME)) for c in self._checkpoints if c.save_top_k > 0}
        replaced = (self.superseded | (self._kept - kept) | passing) - kept  # a name may come back
        self.superseded = {file for file in replaced if Path(file).exists()}
        self._kept = kept
        return {"superseded": sorted(self.superseded)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.superseded = set(state_dict["superseded"])
