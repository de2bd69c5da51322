"""`lit-align test`: how often a model's images win against those of its base, from equal noise."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_align.commands.evaluate.drawing_options import DrawingOptions
from lit_align.commands.evaluate.publish import BASE, publish, stamp
from lit_align.common.lock import folder_turn
from lit_align.common.manifest import read_manifest, refuse_differences
from lit_align.evaluation.prompts import Prompts, prompt_seed, read_prompts
from lit_align.user_errors import UserValueError

if TYPE_CHECKING:  # functions import what they need, so that --help imports no torch
    from lit_align.commands.evaluate.comparison import DrawnModel, Judge, ModelComparison
    from lit_align.commands.shared.models import ModelSpec
    from lit_align.evaluation.tables import Scores

RESULTS = "results.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a model, which names a folder
INCIDENTAL = ("output", "cache", "batch_size", "accelerator", "devices")  # options that change no result


@dataclass(kw_only=True)
class WinRateTest(DrawingOptions):
    """Draw each prompt with all models and their base, from equal noise, and count whose images score higher.

    The noise of an image depends only on its prompt and the seed. A killed run resumes where it stopped; under torchrun
    or SLURM, or with more than one device, the processes share the prompts. The base's images and scores are kept for
    the next model. `output` gets `results.json`, the images and `report.html`.

    Args:
        models: by the names that the results use: checkpoint of lit-align fit, UNet folder or LoRA, or another
            pipeline, a hub id or local folder.
        scorers: names, as a list or separated by commas.
        presets: YAML file that defines the scorers; none: the one of lit-align.
        tolerances: by scorer, differences of scores up to which a prompt is a tie; none: only equal scores are ties.
        prompt_limit: at most this many prompts, evenly spread over the file.
        cache: folder of images and scores; it may be deleted at any time.
    """

    models: dict[str, str]
    scorers: str | list[str]
    presets: Path | None = None
    tolerances: dict[str, float] | None = None
    prompt_limit: int | None = None
    cache: Path = Path("runs/test_cache")

    def run(self) -> None:
        """Draw and score this process's share; the last process writes the results.

        Raises:
            ValueError: if options do not fit each other, or `output` holds results of other options.
        """
        from lit_align.commands.evaluate.comparison import Judge
        from lit_align.commands.shared.process_group import ALONE
        from lit_align.scoring.presets import load_scorers

        self._check()
        found = read_prompts(self.prompts, self.prompt_column)
        prompts = found if self.prompt_limit is None else found.spread(self.prompt_limit)
        specs = self._specs()
        path = self.output / RESULTS
        _refuse_others(path, self._options(), prompts)
        began_with = stamp(path)
        comparison = self._comparison(prompts, specs)
        group = comparison.group
        judges = {n: Judge(s, s.fingerprint()) for n, s in load_scorers(self._scorer_names, self.presets).items()}
        if group.rank == 0:
            print(found if prompts is found else f"{len(prompts.unique)} of {found}")
        models = {name: comparison.draw(name, spec) for name, spec in specs.items()}
        comparison.score(judges, models)
        group.wait()
        scores = group.patiently(lambda: {} if stamp(path) != began_with else comparison.collect(judges, models))
        if scores is None:
            print(f"{group}: other processes are still at work; the last one writes {path}. {ALONE}")
            return
        with folder_turn(self.output, "test"):
            if stamp(path) == began_with:
                publish(path, self._results(comparison, judges, models, scores), models)
            else:
                print(f"{group}: another process has written {path}")

    def _check(self) -> None:
        """Raise a ValueError before hours of drawing."""
        from lit_align.evaluation.win_rates import check_tolerance

        self.check_numbers(
            batch_size=self.batch_size, prompt_limit=1 if self.prompt_limit is None else self.prompt_limit
        )
        names = self._scorer_names
        if not self.models:
            raise UserValueError("models is empty; name at least one, such as --models.aligned last.ckpt.")
        for name in self.models:
            if name == BASE:
                raise UserValueError(
                    f"models: {BASE!r} is what they are compared with, see --base. Choose another name."
                )
            if not NAME.fullmatch(name):
                raise UserValueError(f"models: {name!r} cannot name a folder. Use only letters, digits and . _ -")
        for name, tolerance in (self.tolerances or {}).items():
            if name not in names:
                raise UserValueError(f"tolerances: {name!r} is not among the scorers {', '.join(names)}.")
            check_tolerance(name, tolerance)

    @property
    def _scorer_names(self) -> list[str]:
        from lit_align.scoring.presets import scorer_names

        return scorer_names(self.scorers)

    def _specs(self) -> "dict[str, ModelSpec]":
        """Locations of the base and the models, by name."""
        from lit_align.commands.shared.models import ModelSpec, find_base, spec_of

        base = find_base(self.models.values(), self.base)
        return {BASE: ModelSpec(base, None)} | {name: spec_of(model, base) for name, model in self.models.items()}

    def _comparison(self, prompts: Prompts, specs: "Mapping[str, ModelSpec]") -> "ModelComparison":
        from lit_align.commands.evaluate.comparison import ModelComparison

        group = self.join(pin_threads=True)
        return ModelComparison(
            prompts=prompts.unique,
            seed=self.seed,
            sampling=self.sampling([spec.repo for spec in specs.values()], group.device),
            guidance_scale=self.guidance_for(specs[BASE].repo),
            group=group,
            batch_size=self.batch_size,
            cache=self.cache,
            vae_repo=self.vae_repo,
            variant=self.variant,
        )

    def _options(self) -> Any:
        """All options, as JSON holds them."""
        return json.loads(json.dumps(asdict(self), default=str))

    def _results(
        self,
        comparison: "ModelComparison",
        judges: "Mapping[str, Judge]",
        models: "Mapping[str, DrawnModel]",
        scores: "Scores",
    ) -> dict[str, Any]:
        """Contents of results.json: what was compared, how, and the outcome."""
        from lit_align.evaluation.report.page import FORMAT
        from lit_align.evaluation.tables import compare_all

        seed, tolerances = self.seed, self.tolerances or {}
        how = {"guidance_scale": comparison.guidance_scale, **comparison.sampling._asdict()}
        return {
            "format": FORMAT,
            "made_with": comparison.made_with() | {"options": self._options()},
            "sampling": {**how, "seed": seed},
            "prompts": [{"prompt": prompt, "seed": prompt_seed(prompt, seed)} for prompt in comparison.prompts],
            "models": {
                name: {"repo": model.spec.repo, "weights": model.spec.unet, "fingerprint": model.fingerprint}
                for name, model in models.items()
            },
            "scorers": {
                name: {"fingerprint": judge.fingerprint, "tie_tolerance": tolerances.get(name, 0.0)}
                for name, judge in judges.items()
            },
            "scores": scores,
            "comparisons": compare_all(scores, tolerances),
        }


def _refuse_others(path: Path, options: Mapping[str, Any], prompts: Prompts) -> None:
    """Raise a ValueError if there are results of other options or prompts. Results of equal ones are replaced."""
    from lit_align.evaluation.report.page import FORMAT

    if not path.is_file():
        return
    known = read_manifest(path)
    try:
        before, drawn = known["made_with"]["options"], [row["prompt"] for row in known["prompts"]]
        found = known["format"]
    except (KeyError, TypeError):
        found = None
    if found != FORMAT:
        raise UserValueError(
            f"output: {path} is not of this version's lit-align test: its format is {found}, not {FORMAT}. Choose "
            "another folder, or remove the file."
        )
    digests = [Prompts(drawn, 0, 0).digest(), prompts.digest()]
    began, now = (
        {name: value for name, value in values.items() if name not in INCIDENTAL} | {"prompts' digest": digest}
        for values, digest in zip((before, options), digests, strict=True)
    )
    refuse_differences(path.parent, began, now)
