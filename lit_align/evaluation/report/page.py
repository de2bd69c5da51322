"""report.html of `lit-align test`: one file that a browser opens from the disk, without a network."""

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from html import escape
from math import isqrt
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from lit_align.common.files import write_text
from lit_align.common.progress import track
from lit_align.evaluation.report.sections import all_pairs, decimals, summary, verdict
from lit_align.user_errors import UserFileNotFoundError, UserValueError

FORMAT = 2  # of results.json
LARGEST = 320  # pixels, longer side of an embedded picture
PIXELS = 100_000_000  # of all embedded pictures together: about 20 MB of WebP
SAMPLERS = {"euler": "Euler", "ddim": "DDIM", "dpm++": "DPM++ 2M"}
SMALL = 128  # pixels, width of drawn images under which they are enlarged in squares, not blurred
QUALITY = 80  # of WebP
HERE = Path(__file__).parent


def write_report(folder: Path) -> Path:
    """Write report.html from results.json and the images beside it, and return its path.

    Pictures are embedded small, more of them smaller, and linked to the PNGs in `images`.

    Args:
        folder: what `lit-align test` wrote.

    Raises:
        FileNotFoundError: if results.json or an image is missing.
        ValueError: if results.json is of another format.
    """
    results = _read_results(folder / "results.json")
    files = {
        model: [folder / "images" / model / f"{number:05d}.png" for number in range(len(results["prompts"]))]
        for model in results["models"]
    }
    for file in (file for numbered in files.values() for file in numbered):
        if not file.is_file():
            raise UserFileNotFoundError(
                f"{file} is missing; run lit-align test again with the same --output to draw it."
            )
    report = folder / "report.html"
    write_text(report, _page(results, _embed(files)))
    return report


def _read_results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserFileNotFoundError(f"{path} is missing; lit-align test writes it into its --output.")
    results: Any = json.loads(path.read_text(encoding="utf-8"))
    found = results.get("format") if isinstance(results, dict) else None
    if found != FORMAT:
        raise UserValueError(f"{path}: format is {found}, not {FORMAT}; run this version's lit-align test.")
    return dict(results)


def _embed(files: Mapping[str, list[Path]]) -> dict[str, list[str]]:
    """All pictures by model, WebP in base64."""
    paths = [path for numbered in files.values() for path in numbered]
    side = min(LARGEST, isqrt(PIXELS // len(paths)))  # pixels
    with ThreadPoolExecutor() as pool:  # Pillow decodes and encodes outside Python's lock
        made = pool.map(lambda path: _thumbnail(path, side), paths)
        pictures = iter(list(track(made, len(paths), "report", "image")))
        return {model: [next(pictures) for _ in numbered] for model, numbered in files.items()}


def _thumbnail(path: Path, side: int) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def _page(results: Mapping[str, Any], images: Mapping[str, list[str]]) -> str:
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    base, *others = results["models"]
    comparisons = results["comparisons"]
    return Template((HERE / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{', '.join(others)} against {base}"),
        subtitle=_subtitle(results),
        style=style,
        style_hash=_content_hash(style),
        script=script,
        script_hash=_content_hash(script),
        verdicts="".join(map(verdict, comparisons)),
        pairs=all_pairs(comparisons),
        summaries="".join(summary(number, comparison) for number, comparison in enumerate(comparisons)),
        notes=_notes(results),
        facts=_facts(results),
        data=_data(results, images),
    )


def _content_hash(text: str) -> str:
    """By which the page's content security policy lets this style or script pass and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _data(results: Mapping[str, Any], images: Mapping[str, list[str]]) -> str:
    """What the script reads; without `<`, which could end its element."""
    scorers = {
        name: {"tie_tolerance": about["tie_tolerance"], "decimals": _decimals(results["scores"][name])}
        for name, about in results["scorers"].items()
    }
    comparisons = [{key: comparison[key] for key in ("model", "against")} for comparison in results["comparisons"]]
    data = {key: results[key] for key in ("prompts", "scores")}
    data |= {"scorers": scorers, "comparisons": comparisons, "images": images}
    data |= {"small": results["sampling"]["width"] < SMALL}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _decimals(scores: Mapping[str, list[float]]) -> int:
    return decimals(float(np.std(list(scores.values()))) / 100)


def _subtitle(results: Mapping[str, Any]) -> str:
    how = results["sampling"]
    parts = [
        f"{len(results['prompts']):,} prompts, one image of each by each model from the same noise",
        f"{SAMPLERS.get(how['sampler'], how['sampler'])}, {how['steps']} steps, guidance {how['guidance_scale']:g}",
        f"{how['width']} × {how['height']} px",  # noqa: RUF001
    ]
    return escape(" · ".join(parts))


def _notes(results: Mapping[str, Any]) -> str:
    tolerances = ", ".join(f"{name} {about['tie_tolerance']:g}" for name, about in results["scorers"].items())
    return f"""<p>The win rate is (wins + ties / 2) / prompts; 50 % says that neither model is better by this scorer.
A prompt is a tie where the scores differ by no more than the tie tolerance: {escape(tolerances)}.</p>
<p>A 95 % interval is where the value lies for prompts of this kind, not only for these ones: Wilson's score interval
for win rates and the macro-average (the mean of the scorers' win rates), with the smaller variance of ties and of
averages; a bootstrap over prompts for mean differences. The sign test's p is the chance of so uneven a count of wins
and losses, or a more uneven one, between equal models.</p>
<p>The macro-average counts a prompt as a win where more scorers gain than lose, as a tie where as many do.</p>
<p>Beside a win rate, ▲ says that the whole interval is above 50 %, ▼ below, ○ that it contains 50 %: not decided.
Beside the difference of two pictures ▲ is a win, = a tie, ▼ a loss.</p>
<p>Scorers have scales of their own; differences of one do not compare with those of another.</p>"""


def _facts(results: Mapping[str, Any]) -> str:
    made_with = dict(results["made_with"])
    options = made_with.pop("options")
    models = {name: _model(about) for name, about in results["models"].items()}
    scorers = {
        name: f"fingerprint {about['fingerprint']}, tie tolerance {about['tie_tolerance']:g}"
        for name, about in results["scorers"].items()
    }
    lists = {"Sampling": results["sampling"], "Models": models, "Scorers": scorers}
    return "".join(_fact_list(*item) for item in (lists | {"Versions": made_with, "Options": options}).items())


def _model(about: Mapping[str, Any]) -> str:
    weights = "" if about["weights"] is None else f" with {about['weights']}"
    return f"{about['repo']}{weights}, fingerprint {about['fingerprint']}"


def _fact_list(title: str, facts: Mapping[str, Any]) -> str:
    texts = {
        name.replace("_", " "): value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()
    }
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in texts.items())
    return f"<div><h3>{title}</h3><dl>{rows}</dl></div>"
