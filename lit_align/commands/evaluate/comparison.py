"""All models draw the same prompts from the same noise, and all scorers judge: this process's share of it."""

import gc
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import transformers

from lit_align.backbones.sampling import SAMPLING_VERSION
from lit_align.commands.shared.image_files import Wanted, draw_images, is_whole, note_plain
from lit_align.commands.shared.models import Model, ModelSpec, Sampling, at_a_time, load_models, place_models
from lit_align.commands.shared.process_group import ProcessGroup
from lit_align.common.progress import Progress, show_progress
from lit_align.evaluation.image_store import Gallery
from lit_align.evaluation.noise import prompt_seed
from lit_align.scoring.base import Scorer
from lit_align.user_errors import UserRuntimeError


class Judge(NamedTuple):
    """A scorer and who it is."""

    scorer: Scorer
    fingerprint: str  # asked before `prepare` cast its weights


class Contest(NamedTuple):
    """What every model draws, and where."""

    prompts: list[str]  # each once
    seed: int  # of the noise, see `prompt_seed`
    sampling: Sampling
    guidance_scale: float
    group: ProcessGroup
    batch_size: int  # images, see `at_a_time`
    cache: Path  # folder of galleries

    @property
    def mine(self) -> range:
        """Numbers of the prompts that are this process's share."""
        return range(self.group.rank, len(self.prompts), self.group.world_size)

    def draw(self, name: str, spec: ModelSpec, vae_repo: str | None, variant: str | None) -> tuple[Gallery, str]:
        """The share's images by a model, those that are not there yet, and the model's fingerprint.

        The model is loaded for this alone, so that there is one in memory at a time.
        """
        models = load_models([spec], vae_repo, variant)
        gallery = Gallery(self.cache / self._folder(models[0]), self.prompts, self.seed)
        todo = [
            Wanted(self.prompts[number], prompt_seed(self.prompts[number], self.seed), gallery.paths[number])
            for number in self.mine
            if not is_whole(gallery.paths[number])
        ]
        if todo:
            place_models(models, self.group.device, self.sampling.precision)
        with self._bar(f"drawing {name}", len(todo)) as bar:
            plain = draw_images(models[0], todo, self.guidance_scale, self.sampling, self.batch_size, bar.update)
        note_plain(self.group, name, plain)
        fingerprint = models[0].fingerprint
        models.clear()
        gc.collect()  # a pipeline and its modules know each other
        if self.group.device.type == "cuda":
            torch.cuda.empty_cache()
        return gallery, fingerprint

    def _bar(self, title: str, total: int) -> Progress:
        """Of the first process's share, if there is something to do."""
        return show_progress(total, title, "image", hidden=self.group.rank > 0)

    def _folder(self, model: Model) -> str:
        """What decides an image beside prompt and seed, as 16 hexadecimal digits."""
        threads = torch.get_num_threads() if self.group.device.type == "cpu" else None  # rounding depends on them
        how = [model.fingerprint, self.sampling._asdict(), self.guidance_scale, self.group.device.type, threads]
        versions = [SAMPLING_VERSION, str(torch.__version__), diffusers.__version__, transformers.__version__]
        digest = hashlib.blake2b(json.dumps([*how, *versions]).encode())
        return digest.hexdigest()[:16]

    def score(self, judges: Mapping[str, Judge], galleries: Mapping[str, Gallery]) -> None:
        """Score the share's images, those that have no score yet."""
        shares = list({gallery.folder: gallery for gallery in galleries.values()}.values())  # two models may be one
        keys = [gallery.keys(self.mine) for gallery in shares]
        for name, judge in judges.items():
            todo = []
            for gallery, own in zip(shares, keys, strict=True):
                known = gallery.scores(judge.fingerprint)
                todo.append([number for number, key in zip(self.mine, own, strict=True) if key not in known])
            total = sum(map(len, todo))
            if total:
                judge.scorer.prepare(self.group.device)
            count = at_a_time(self.batch_size, self.group.device)
            with self._bar(f"scoring by {name}", total) as bar:
                for gallery, numbers in zip(shares, todo, strict=True):
                    gallery.score(judge.scorer, judge.fingerprint, numbers, count, bar.update)

    def collect(
        self, judges: Mapping[str, Judge], galleries: Mapping[str, Gallery]
    ) -> dict[str, dict[str, list[float]]] | None:
        """All processes' scores by scorer and model, one a prompt; None while some are missing.

        Raises:
            RuntimeError: if some are missing and there are no other processes.
        """
        keys = {name: gallery.keys(range(len(self.prompts))) for name, gallery in galleries.items()}
        scores: dict[str, dict[str, list[float]]] = {}
        for judge_name, judge in judges.items():
            scores[judge_name] = {}
            for name, gallery in galleries.items():
                known = gallery.scores(judge.fingerprint)
                found = [known[key] for key in keys[name] if key in known]
                if len(found) < len(self.prompts):
                    if self.group.world_size == 1:
                        raise UserRuntimeError(
                            f"cache: {len(self.prompts) - len(found)} images of {name} in {gallery.folder} have no "
                            f"score by {judge_name}, for something else has changed them since. Run the same command "
                            "again, or with a --cache of its own."
                        )
                    return None
                scores[judge_name][name] = found
        return scores
