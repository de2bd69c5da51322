"""`lit-align predict`: images of prompts, by any model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_align.commands.evaluate.drawing_options import DrawingOptions
from lit_align.common.files import write_text
from lit_align.common.manifest import check_manifest
from lit_align.common.progress import show_progress
from lit_align.evaluation.prompts import Prompts, prompt_seed, read_prompts

if TYPE_CHECKING:  # functions import what they need, so that --help imports no torch
    from lit_align.commands.shared.models import Model, ModelSpec, Sampling
    from lit_align.commands.shared.process_group import ProcessGroup

MANIFEST, FORMAT = "predict.json", 1
TABLE = "images.jsonl"


@dataclass(kw_only=True)
class Predict(DrawingOptions):
    """Draw images of prompts with a checkpoint, an exported model or a whole pipeline.

    The first image of a prompt is the one that `lit-align test` draws with these options. A killed run resumes where it
    stopped; under torchrun or SLURM, or with more than one device, the processes share the prompts. `output` gets
    `00000-0.png` (prompt and image, from 0), `images.jsonl`, which describes the images, and `predict.json`, which says
    how they were made.

    Args:
        model: checkpoint of lit-align fit, UNet folder or LoRA, or a pipeline, a hub id or local folder.
        images_per_prompt: image i has the noise of a first image with seed + i.
    """

    model: str
    images_per_prompt: int = 1

    def run(self) -> None:
        """Draw this process's share of the images.

        Raises:
            ValueError: if options do not fit each other, or `output` was begun with others.
        """
        from lit_align.commands.shared.models import find_base, is_pipeline, load_models, move_models, spec_of

        self.check_numbers(batch_size=self.batch_size, images_per_prompt=self.images_per_prompt)
        prompts = read_prompts(self.prompts, self.prompt_column)
        spec = spec_of(self.model, self.model if is_pipeline(self.model) else find_base([self.model], self.base))
        group = self.join(pin_threads=True)
        sampling = self.sampling([spec.repo], group.device)
        (model,) = load_models([spec], self.vae_repo, self.variant)
        check_manifest(self.output / MANIFEST, self._manifest(prompts, spec, model, sampling), made=["*.png"])
        move_models([model], group.device, sampling.precision)
        if group.rank == 0:
            print(prompts)
        rows = _rows(prompts.unique, self.images_per_prompt, self.seed)
        self._draw(model, rows[group.rank :: group.world_size], sampling, group)
        group.wait()
        _write_table(self.output, rows, group)

    def _manifest(self, prompts: Prompts, spec: "ModelSpec", model: "Model", sampling: "Sampling") -> dict[str, Any]:
        return {
            "format": FORMAT,
            "prompts": {"count": len(prompts.unique), "digest": prompts.digest()},
            "images_per_prompt": self.images_per_prompt,
            "seed": self.seed,
            "model": spec._asdict(),
            "weights": model.fingerprint,
            "vae_repo": self.vae_repo,
            "drawing": {"guidance_scale": self.guidance_for(spec.repo), **sampling._asdict()},
        }

    def _draw(
        self, model: "Model", rows: Sequence[dict[str, Any]], sampling: "Sampling", group: "ProcessGroup"
    ) -> None:
        from lit_align.commands.shared.image_files import Wanted, draw_images, is_whole, note_plain

        share = [Wanted(row["prompt"], row["seed"], self.output / row["file"]) for row in rows]
        todo = [image for image in share if not is_whole(image.path)]
        scale = self.guidance_for(model.backbone.repo)
        with show_progress(len(todo), "drawing", "image", hidden=group.rank > 0) as bar:
            plain = draw_images(model, todo, scale, sampling, self.batch_size, bar.update)
        note_plain(group, "the model", plain)
        print(f"{group}: drew {len(todo)} images, {len(share) - len(todo)} were done before")


def _rows(prompts: Sequence[str], images_per_prompt: int, seed: int) -> list[dict[str, Any]]:
    return [
        {"number": number, "prompt": prompt, "seed": prompt_seed(prompt, seed + i), "file": f"{number:05d}-{i}.png"}
        for number, prompt in enumerate(prompts)
        for i in range(images_per_prompt)
    ]


def _write_table(output: Path, rows: Sequence[dict[str, Any]], group: "ProcessGroup") -> None:
    """Write the table once all images exist. Processes that end together write equal files."""
    from lit_align.commands.shared.process_group import ALONE

    def missing() -> int:
        return sum(not (output / row["file"]).is_file() for row in rows)

    if group.patiently(lambda: None if missing() else True) is None:
        print(f"{group}: {missing()} images of other processes are still to come; the last one writes {TABLE}. {ALONE}")
        return
    write_text(output / TABLE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{output}: {len(rows)} images, which {TABLE} describes")
