"""All models draw all prompts from equal noise, and all scorers score the images. Processes share the prompts."""

import gc
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers

import lit_align
from lit_align.backbones.sampling import SAMPLING_VERSION
from lit_align.commands.shared.image_files import Wanted, draw_images, is_whole, note_plain
from lit_align.commands.shared.models import Model, ModelSpec, Sampling, at_a_time, load_models, move_models
from lit_align.commands.shared.process_group import ProcessGroup
from lit_align.common.progress import Progress, show_progress
from lit_align.evaluation.image_store import ImageStore
from lit_align.evaluation.prompts import prompt_seed
from lit_align.scoring.base import Scorer
from lit_align.user_errors import UserRuntimeError


class Judge(NamedTuple):
    """A scorer with its fingerprint."""

    scorer: Scorer
    fingerprint: str  # taken before `prepare` cast the weights


class DrawnModel(NamedTuple):
    """A model with the images that it draws."""

    spec: ModelSpec
    fingerprint: str
    images: ImageStore


@dataclass(frozen=True)
class ModelComparison:
    """Draws and scores this process's share of the prompts.

    Args:
        prompts: without duplicates.
        seed: of the noise, see `prompt_seed`.
        sampling: settings of the images.
        guidance_scale: of classifier-free guidance.
        group: processes that share the prompts.
        batch_size: images at a time, see `at_a_time`.
        cache: folder of the image stores.
        vae_repo: hub id or local folder of another VAE.
        variant: of the pipelines' weight files.
    """

    prompts: list[str]
    seed: int
    sampling: Sampling
    guidance_scale: float
    group: ProcessGroup
    batch_size: int
    cache: Path
    vae_repo: str | None
    variant: str | None

    @property
    def share(self) -> range:
        """Numbers of the prompts that this process draws and scores."""
        return range(self.group.rank, len(self.prompts), self.group.world_size)

    def draw(self, name: str, spec: ModelSpec) -> DrawnModel:
        """Draw the share's missing images with a model. The model is in memory only meanwhile."""
        models = load_models([spec], self.vae_repo, self.variant)
        store = ImageStore(self.cache / self._folder(models[0]), self.prompts, self.seed)
        todo = [
            Wanted(self.prompts[number], prompt_seed(self.prompts[number], self.seed), store.paths[number])
            for number in self.share
            if not is_whole(store.paths[number])
        ]
        if todo:
            move_models(models, self.group.device, self.sampling.precision)
        with self._bar(f"drawing {name}", len(todo)) as bar:
            plain = draw_images(models[0], todo, self.guidance_scale, self.sampling, self.batch_size, bar.update)
        note_plain(self.group, name, plain)
        drawn = DrawnModel(spec, models[0].fingerprint, store)
        models.clear()
        gc.collect()  # a pipeline and its modules refer to each other
        if self.group.device.type == "cuda":
            torch.cuda.empty_cache()
        return drawn

    def _bar(self, title: str, total: int) -> Progress:
        """Progress of the first process's share."""
        return show_progress(total, title, "image", hidden=self.group.rank > 0)

    def _folder(self, model: Model) -> str:
        """Name of a store's folder: 16 hexadecimal digits of all that decides an image beside prompt and seed."""
        threads = torch.get_num_threads() if self.group.device.type == "cpu" else None  # rounding depends on them
        how = [model.fingerprint, self.sampling._asdict(), self.guidance_scale, self.group.device.type, threads]
        versions = [SAMPLING_VERSION, str(torch.__version__), diffusers.__version__, transformers.__version__]
        return hashlib.blake2b(json.dumps([*how, *versions]).encode()).hexdigest()[:16]

    def made_with(self) -> dict[str, Any]:
        """Versions of the libraries, and the device."""
        on_gpu, cpu = self.group.device.type == "cuda", f"CPU, threads: {torch.get_num_threads()}"
        return {
            "lit_align": lit_align.__version__,
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name(self.group.device) if on_gpu else cpu,
        }

    def score(self, judges: Mapping[str, Judge], models: Mapping[str, DrawnModel]) -> None:
        """Score the share's images that have no score yet."""
        stores = list({model.images.folder: model.images for model in models.values()}.values())  # models may be equal
        keys = [store.keys(self.share) for store in stores]
        count = at_a_time(self.batch_size, self.group.device)
        for name, judge in judges.items():
            todo = []
            for store, own in zip(stores, keys, strict=True):
                known = store.scores(judge.fingerprint)
                todo.append([number for number, key in zip(self.share, own, strict=True) if key not in known])
            total = sum(map(len, todo))
            if total:
                judge.scorer.prepare(self.group.device)
            with self._bar(f"scoring by {name}", total) as bar:
                for store, numbers in zip(stores, todo, strict=True):
                    store.score(judge.scorer, judge.fingerprint, numbers, count, bar.update)

    def collect(
        self, judges: Mapping[str, Judge], models: Mapping[str, DrawnModel]
    ) -> dict[str, dict[str, list[float]]] | None:
        """Scores of all processes by scorer and model, one per prompt; None while some are missing.

        Raises:
            UserRuntimeError: if some are missing and there are no other processes.
        """
        keys = {name: model.images.keys(range(len(self.prompts))) for name, model in models.items()}
        scores: dict[str, dict[str, list[float]]] = {judge_name: {} for judge_name in judges}
        for judge_name, judge in judges.items():
            for name, model in models.items():
                known = model.images.scores(judge.fingerprint)
                found = [known[key] for key in keys[name] if key in known]
                missing = len(self.prompts) - len(found)
                if missing and self.group.world_size == 1:
                    raise UserRuntimeError(
                        f"cache: {missing} images of {name} in {model.images.folder} have no score by {judge_name}; "
                        "another program has changed them after they were scored. Run this command again, or choose "
                        "another --cache."
                    )
                if missing:
                    return None
                scores[judge_name][name] = found
        return scores
