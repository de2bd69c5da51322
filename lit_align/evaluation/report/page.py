"""report.html of `lit-align test`: one file that a browser opens from the disk, without a network."""

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from lit_align.common.files import write_text
from lit_align.common.progress import track
from lit_align.evaluation.report import sections
from lit_align.user_errors import UserFileNotFoundError, UserValueError

FORMAT = 2  # of results.json
LARGEST = 320  # pixels, longer side of an embedded picture
PIXELS = 100_000_000  # of all embedded pictures together: about 20 MB of WebP
SMALL = 128  # pixels: narrower images are enlarged in squares, not blurred
QUALITY = 80  # of WebP
HERE = Path(__file__).parent


def write_report(folder: Path) -> Path:
    """Write report.html from results.json and the images beside it, and return its path.

    Pictures are embedded small, the smaller the more there are, and linked to the PNGs in `images`.

    Args:
        folder: output of `lit-align test`.

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
    write_text(report, _render(results, _embed(files)))
    return report


def make_templates() -> Environment:
    """Templates of the page. All that they insert is escaped, except `Markup`."""
    templates = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = (sections.side, sections.by_side, sections.digits, sections.percent, sections.percents, sections.number)
    templates.filters |= {use.__name__: use for use in (*filters, sections.p_value)} | {"content_hash": _content_hash}
    templates.globals |= {"MARKS": sections.MARKS, "SIGN_TEST": "sign test, p"}
    templates.globals["SAMPLERS"] = {"euler": "Euler", "ddim": "DDIM", "dpm++": "DPM++ 2M"}
    return templates


def _read_results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserFileNotFoundError(f"{path} is missing; lit-align test writes it into its --output.")
    results: Any = json.loads(path.read_text(encoding="utf-8"))
    found = results.get("format") if isinstance(results, dict) else None
    if found != FORMAT:
        raise UserValueError(f"{path}: format is {found}, not {FORMAT}; run this version's lit-align test.")
    return dict(results)


def _embed(files: Mapping[str, list[Path]]) -> dict[str, list[str]]:
    """Encode all pictures by model, as WebP in base64."""
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


def _render(results: Mapping[str, Any], images: Mapping[str, list[str]]) -> str:
    style, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    base, *others = results["models"]
    page = make_templates().get_template("page.html")
    return page.render(
        title=f"{', '.join(others)} against {base}",
        style=style,
        script=script,
        results=results,
        sampling=results["sampling"],
        facts=_facts(results),
        data=_data(results, images),
    )


def _content_hash(text: str) -> str:
    """Hash by which the page's content security policy admits this style or script and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _data(results: Mapping[str, Any], images: Mapping[str, list[str]]) -> Markup:
    """Write the script's input as JSON, without `<`, which could end its element."""
    scorers = {
        name: {
            "tie_tolerance": about["tie_tolerance"],
            "decimals": sections.decimals(float(np.std(list(results["scores"][name].values()))) / 100),
        }
        for name, about in results["scorers"].items()
    }
    comparisons = [{key: comparison[key] for key in ("model", "against")} for comparison in results["comparisons"]]
    data = {key: results[key] for key in ("prompts", "scores")}
    data |= {"scorers": scorers, "comparisons": comparisons, "images": images}
    data |= {"small": results["sampling"]["width"] < SMALL}
    return Markup(json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def _facts(results: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Names and values of how the results were made, by heading."""
    made_with = dict(results["made_with"])
    options = made_with.pop("options")
    scorers = {
        name: f"fingerprint {about['fingerprint']}, tie tolerance {about['tie_tolerance']:g}"
        for name, about in results["scorers"].items()
    }
    models = {name: _model(about) for name, about in results["models"].items()}
    lists = {"Sampling": results["sampling"], "Models": models, "Scorers": scorers}
    return {title: _texts(facts) for title, facts in (lists | {"Versions": made_with, "Options": options}).items()}


def _model(about: Mapping[str, Any]) -> str:
    weights = "" if about["weights"] is None else f" with {about['weights']}"
    return f"{about['repo']}{weights}, fingerprint {about['fingerprint']}"


def _texts(facts: Mapping[str, Any]) -> dict[str, str]:
    return {
        name.replace("_", " "): value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()
    }
