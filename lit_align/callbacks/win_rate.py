"""Win rate against the base during training: equal prompts and noise, judged by scorers."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_align.callbacks.preemption import end_if_signalled
from lit_align.callbacks.rank_images import Sampling, gather_shares, generate_on_ranks, pause_throughput
from lit_align.common.progress import track
from lit_align.evaluation.prompts import prompt_seed, read_prompts
from lit_align.evaluation.win_rates import Comparison, compare
from lit_align.internals import save_schedule
from lit_align.scoring.base import Scorer
from lit_align.training.steps import at_every
from lit_align.user_errors import UserValueError

TAGS = ("win_rate/", "score_vs_base/")  # prefixes of all logged names


class WinRate(L.Callback):
    """Measures the win rate against the base every N steps and at the end; `lit-align test` does it at full size.

    Logs `win_rate/<scorer>`, `win_rate/macro` with both ends of its 95 % interval, and the difference of the mean
    scores as `score_vs_base/<scorer>`. A ModelCheckpoint may monitor them. The base is scored before the first step.
    The ranks share the prompts. Training is not affected.

    Args:
        prompts: one image each; or a file of prompts, see `lit-align generate`.
        scorers: by name, as in configs/scorers. They stay on the CPU and move to the device one at a time.
        every_n_steps: optimizer steps between measurements.
        height: pixels.
        width: pixels.
        steps: Euler steps per image.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        seed: the noise of an image depends only on this seed and on the prompt.
        tolerances: by scorer's name, the difference up to which two scores are a tie; 0 by default.

    Raises:
        UserValueError: if there is no prompt or one twice, or if a tolerance is negative or of no scorer.
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
        _check_scorers(scorers)
        self.prompts = read_prompts(prompts).unique if isinstance(prompts, str) else list(prompts)
        _check_prompts(self.prompts)
        self.scorers, self.every_n_steps, self.tolerances = scorers, every_n_steps, tolerances
        self.seed, self.sampling = seed, Sampling(height, width, steps, guidance_scale)
        self.fingerprints = {name: scorer.fingerprint() for name, scorer in scorers.items()}
        nothing = dict.fromkeys(scorers, torch.zeros(1))
        self.names = list(_values(compare(nothing, nothing, tolerances)))  # refuses wrong tolerances at once
        self.base: dict[str, Tensor] = {}  # scores; in the checkpoint, as a resumed run cannot make them again
        self.values: dict[str, float] = {}  # of the last measurement
        self.measured_at = 0  # step of the last measurement
        self.changed: list[str] = []  # settings that differ from the checkpoint's

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and str(callback.monitor).startswith(TAGS):
                    self._check_monitor(callback)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self.base, self.values, self.measured_at = self._scores(trainer, pl_module), {}, 0
        elif not self.base:
            raise UserValueError(
                f"WinRate cannot score the base at step {trainer.global_step}: the run began without WinRate or with "
                f"another value of {', '.join(self.changed) or 'all'}. Resume with the run's own WinRate, or without."
            )
        self._publish(trainer)  # for a ModelCheckpoint that saves before the next measurement

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_every(trainer, self.every_n_steps):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.measured_at != trainer.global_step:
            self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        last = {"base": self.base, "values": self.values, "measured_at": self.measured_at}
        return {**last, "drawing": self._drawing()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        then, now = state_dict["drawing"], self._drawing()
        self.changed = [name for name in now if then.get(name) != now[name]]
        if not self.changed:
            self.base, self.values, self.measured_at = (state_dict[k] for k in ("base", "values", "measured_at"))

    def _check_monitor(self, checkpoint: ModelCheckpoint) -> None:
        """Refuse a ModelCheckpoint whose monitored value is missing, of another step, or best when smallest.

        Lightning silently skips a missing value, and uses a value of an earlier step.
        """
        monitor = checkpoint.monitor
        every_n_steps, save_on_train_epoch_end = save_schedule(checkpoint)
        if monitor not in self.names:
            raise UserValueError(f"ModelCheckpoint.monitor is {monitor!r}; WinRate logs {', '.join(self.names)}.")
        if checkpoint.mode != "max":
            raise UserValueError(
                f"ModelCheckpoint.mode is {checkpoint.mode!r}, but a greater {monitor} is better. Set max."
            )
        if every_n_steps == 0 or every_n_steps % self.every_n_steps:
            raise UserValueError(
                f"ModelCheckpoint.every_n_train_steps is {every_n_steps}, but WinRate measures every "
                f"{self.every_n_steps} steps: others would be ranked by an older {monitor}. Set a multiple of "
                f"{self.every_n_steps}."
            )
        if not save_on_train_epoch_end:
            raise UserValueError(
                f"ModelCheckpoint.save_on_train_epoch_end must be true where it monitors {monitor}: otherwise the "
                "save at the last batch of an epoch waits for a validation, and holds later weights."
            )

    def _drawing(self) -> dict[str, Any]:
        """All settings that determine the base's scores."""
        sampling = self.sampling._asdict()
        return {"prompts": self.prompts, "seed": self.seed, **sampling, "scorers": self.fingerprints}

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.measured_at = step = trainer.global_step
        pause_throughput(trainer)
        self.values = _values(compare(self._scores(trainer, pl_module), self.base, self.tolerances))
        self._publish(trainer)
        for logger in trainer.loggers:
            logger.log_metrics(self.values, step)  # `log` would wait for a logged step, and repeat the value later
        macro, low, high = (self.values[f"win_rate/{name}"] for name in ("macro", "macro_low", "macro_high"))
        single = ", ".join(f"{name} {self.values[f'win_rate/{name}']:.3g}" for name in self.scorers)
        rank_zero_info(f"step {step:,}: win rate against the base {macro:.3g} ({low:.3g} to {high:.3g}); {single}")

    def _publish(self, trainer: L.Trainer) -> None:
        """Make the values available to ModelCheckpoint, on all ranks, until the next measurement.

        `log` would lose them in a resumed run, and is forbidden in `on_train_end`.
        """
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.values.items()})

    def _scores(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        """Score the model's current images; by scorer's name, (prompts,) each."""
        seeds = [prompt_seed(prompt, self.seed) for prompt in self.prompts]
        numbers, images = generate_on_ranks(trainer, pl_module, self.prompts, seeds, self.sampling)
        prompts = [self.prompts[number] for number in numbers]
        columns = [self._score(trainer, name, images, prompts) for name in self.scorers]
        scores = gather_shares(trainer, pl_module, torch.stack(columns, 1), len(self.prompts))
        return dict(zip(self.scorers, scores.unbind(1), strict=True))

    def _score(self, trainer: L.Trainer, name: str, images: Tensor, prompts: list[str]) -> Tensor:
        """Score images one by one, (n,): in a batch, scores would depend on the number of ranks."""
        scorer, scores = self.scorers[name], []
        pairs, hidden = zip(images, prompts, strict=True), not trainer.is_global_zero
        scorer.prepare(trainer.strategy.root_device)
        try:
            for image, prompt in track(pairs, len(prompts), f"scoring by {name}", "image", delay=10.0, hidden=hidden):
                scores.append(scorer.score([image], [prompt]))
                end_if_signalled(trainer)
            return torch.cat(scores)
        finally:
            scorer.to("cpu")  # to free memory for training


def _check_scorers(scorers: dict[str, Scorer]) -> None:
    if not scorers:
        raise UserValueError("WinRate.scorers is empty; name at least one scorer, or leave the callback out.")
    reserved = sorted({"macro", "macro_low", "macro_high"} & scorers.keys())
    if reserved:
        raise UserValueError(f"WinRate.scorers: {reserved[0]!r} is the name of their mean. Rename the scorer.")


def _check_prompts(prompts: list[str]) -> None:
    if not prompts:
        raise UserValueError("WinRate.prompts is empty; name at least one prompt, or leave the callback out.")
    twice = [prompt for prompt in prompts if prompts.count(prompt) > 1]
    if twice:
        raise UserValueError(f"WinRate.prompts has {twice[0]!r} twice; it would count twice from equal noise.")


def _values(comparison: Comparison) -> dict[str, float]:
    """Name the values to log."""
    rates = {f"win_rate/{name}": outcome.win_rate for name, outcome in comparison.scorers.items()}
    differences = {f"score_vs_base/{name}": outcome.difference for name, outcome in comparison.scorers.items()}
    low, high = comparison.macro_interval
    macro = {"win_rate/macro": comparison.macro, "win_rate/macro_low": low, "win_rate/macro_high": high}
    return rates | macro | differences
