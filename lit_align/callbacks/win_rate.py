"""How the model fares against the base while it trains: the same prompts and noise, judged by scorers."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_align.callbacks.rank_images import Sampling, draw, gather, pause_throughput, share
from lit_align.evaluation.noise import prompt_seed
from lit_align.evaluation.prompts import read_prompts
from lit_align.evaluation.win_rates import Comparison, compare
from lit_align.scoring.base import Scorer
from lit_align.user_errors import UserValueError

TAGS = ("win_rate/", "score_vs_base/")  # of all that it logs


class WinRate(L.Callback):
    """Measures the win rate against the base every N steps and at the end, as `lit-align test` does at full size.

    It logs `win_rate/<scorer>`, `win_rate/macro` with both ends of its 95 % interval, and the difference of the mean
    scores as `score_vs_base/<scorer>`. A ModelCheckpoint may monitor them. The base draws before the first step. The
    ranks share the prompts. Weights, modes, random state and precision are as before afterwards.

    Args:
        prompts: one image each; or a file of them, see `lit-align generate`.
        scorers: by name, as in configs/scorers. They wait on the CPU and are on the device one at a time.
        every_n_steps: optimizer steps between measurements.
        height: pixels.
        width: pixels.
        steps: Euler steps per image.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        seed: the noise of an image depends on it and on the prompt alone.
        tolerances: by scorer's name, differences up to which are ties; 0 where none is given.

    Raises:
        ValueError: if a prompt is there twice or not at all, or if a tolerance is negative or of no scorer.
    """

    def __init__(
        self,
        prompts: list[str] | str,
        scorers: dict[str, Scorer],
        every_n_steps: int = 500,
        height: int = 1024,
        width: int = 1024,
        steps: int = 50,
        guidance_scale: float = 5.0,
        seed: int = 0,
        tolerances: dict[str, float] | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise UserValueError(f"WinRate.every_n_steps is {every_n_steps}; it must be at least 1.")
        if not scorers:
            raise UserValueError("WinRate.scorers is empty; name at least one scorer, or leave the callback out.")
        reserved = sorted({"macro", "macro_low", "macro_high"} & scorers.keys())
        if reserved:
            raise UserValueError(
                f"WinRate.scorers: {reserved[0]!r} is the name of their mean. Name the scorer otherwise."
            )
        self.prompts = read_prompts(prompts).unique if isinstance(prompts, str) else list(prompts)
        if not self.prompts:
            raise UserValueError("WinRate.prompts is empty; name at least one prompt, or leave the callback out.")
        twice = [prompt for prompt in self.prompts if self.prompts.count(prompt) > 1]
        if twice:
            raise UserValueError(f"WinRate.prompts has {twice[0]!r} twice; it would count twice from the same noise.")
        self.scorers, self.every_n_steps, self.tolerances = scorers, every_n_steps, tolerances
        self.seed, self.sampling = seed, Sampling(height, width, steps, guidance_scale)
        self.fingerprints = {name: scorer.fingerprint() for name, scorer in scorers.items()}
        nothing = dict.fromkeys(scorers, torch.zeros(1))
        self.names = list(_values(compare(nothing, nothing, tolerances)))  # refuses tolerances before hours of work
        self.base: dict[str, Tensor] = {}  # scores; in the checkpoint, for a resumed run cannot draw the base again
        self.values: dict[str, float] = {}  # as logged last
        self.measured_at = 0
        self.changed: list[str] = []  # since the checkpoint that this run resumes from

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and str(callback.monitor).startswith(TAGS):
                    self._check(callback)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self.base, self.values, self.measured_at = self._scores(trainer, pl_module), {}, 0
        elif not self.base:
            raise UserValueError(
                f"WinRate cannot draw the base at step {trainer.global_step}: the run began without WinRate or with "
                f"another value of {', '.join(self.changed) or 'all'}. Resume with what it began with, or without "
                "WinRate."
            )
        self._publish(trainer)  # to a ModelCheckpoint that saves before the next measurement

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "values": self.values,
            "measured_at": self.measured_at,
            "drawing": self._drawing(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        then, now = state_dict["drawing"], self._drawing()
        self.changed = [name for name in now if then.get(name) != now[name]]
        if not self.changed:
            self.base, self.values, self.measured_at = (state_dict[k] for k in ("base", "values", "measured_at"))

    def _check(self, checkpoint: ModelCheckpoint) -> None:
        """Refuse to choose checkpoints by a value that is not there, not theirs, or that would choose the worst.

        Lightning would wait for a missing value without a word, and go on with that of an earlier step.
        """
        monitor, every_n_steps = checkpoint.monitor, checkpoint._every_n_train_steps
        if monitor not in self.names:
            raise UserValueError(f"ModelCheckpoint.monitor is {monitor!r}; WinRate logs {', '.join(self.names)}.")
        if checkpoint.mode != "max":
            raise UserValueError(
                f"ModelCheckpoint.mode is {checkpoint.mode!r}, but more of {monitor} is better. Set max."
            )
        if every_n_steps == 0 or every_n_steps % self.every_n_steps:
            raise UserValueError(
                f"ModelCheckpoint.every_n_train_steps is {every_n_steps}, but WinRate measures every "
                f"{self.every_n_steps} steps: between them {monitor} is another step's. Set a multiple of "
                f"{self.every_n_steps}."
            )
        if not checkpoint._save_on_train_epoch_end:
            raise UserValueError(
                f"ModelCheckpoint.save_on_train_epoch_end must be true where it monitors {monitor}: at the last batch "
                "of an epoch it would wait for a validation, and save what was trained since."
            )

    def _drawing(self) -> dict[str, Any]:
        """All that decides the base's scores."""
        return {
            "prompts": self.prompts,
            "seed": self.seed,
            **self.sampling._asdict(),
            "scorers": self.fingerprints,
        }

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == self.measured_at:  # accumulation ends several batches at one step
            return
        self.measured_at = step
        pause_throughput(trainer)
        self.values = _values(compare(self._scores(trainer, pl_module), self.base, self.tolerances))
        self._publish(trainer)
        for logger in trainer.loggers:
            logger.log_metrics(self.values, step)  # `log` would wait for a logged step, and repeat it at all later ones
        macro, low, high = (self.values[f"win_rate/{name}"] for name in ("macro", "macro_low", "macro_high"))
        single = ", ".join(f"{name} {self.values[f'win_rate/{name}']:.3g}" for name in self.scorers)
        rank_zero_info(f"step {step:,}: win rate against the base {macro:.3g} ({low:.3g} to {high:.3g}); {single}")

    def _publish(self, trainer: L.Trainer) -> None:
        """Give the values to ModelCheckpoint, on all ranks alike and until the next measurement.

        Straight into the Trainer's dictionary: `log` forgets them in a resumed run, and is forbidden in `on_train_end`.
        """
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.values.items()})

    def _scores(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        """By scorer's name, (prompts,) each of the model as it is."""
        mine = [self.prompts[number] for number in share(trainer, len(self.prompts))]
        seeds = [prompt_seed(prompt, self.seed) for prompt in mine]
        images = draw(trainer, pl_module, mine, seeds, self.sampling)
        columns = [self._score(scorer, images, mine, pl_module.device) for scorer in self.scorers.values()]
        scores = gather(trainer, pl_module, torch.stack(columns, 1), len(self.prompts))
        return dict(zip(self.scorers, scores.unbind(1), strict=True))

    def _score(self, scorer: Scorer, images: Tensor, prompts: list[str], device: torch.device) -> Tensor:
        """(n,) one by one, so that no score depends on the batch and so on the number of ranks."""
        scorer.prepare(device)
        try:
            return torch.cat([scorer.score([image], [p]) for image, p in zip(images, prompts, strict=True)])
        finally:
            scorer.to("cpu")  # training needs the memory


def _values(comparison: Comparison) -> dict[str, float]:
    """What is logged, by name."""
    rates = {f"win_rate/{name}": outcome.win_rate for name, outcome in comparison.scorers.items()}
    differences = {f"score_vs_base/{name}": outcome.difference for name, outcome in comparison.scorers.items()}
    low, high = comparison.macro_interval
    return {
        **rates,
        "win_rate/macro": comparison.macro,
        "win_rate/macro_low": low,
        "win_rate/macro_high": high,
        **differences,
    }
