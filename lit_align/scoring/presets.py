"""Scorers by the names that a YAML file gives them."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lit_align.scoring.base import Scorer
from lit_align.user_errors import UserValueError

PRESETS = Path(__file__).with_name("presets.yaml")


def scorer_names(scorers: str | Sequence[str]) -> list[str]:
    """Names from a list, or from text with commas, each once.

    Raises:
        ValueError: if there is none.
    """
    listed = scorers.split(",") if isinstance(scorers, str) else scorers
    names = list(dict.fromkeys(name.strip() for name in listed if name.strip()))
    if not names:
        raise UserValueError("scorers is empty; name at least one, such as hpsv2.1,pickscore.")
    return names


def load_scorers(names: Sequence[str], path: Path | None = None) -> dict[str, Scorer]:
    """The scorers of these names, weights loaded, in the order of `names`.

    Args:
        names: of entries in the file.
        path: YAML of names with class_path and init_args; without, the one of this package. A local folder in it is
            relative to the working directory.

    Raises:
        ValueError: if a name is not in the file, or if its entry does not fit its class.
    """
    path = PRESETS if path is None else path
    presets = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    for name in names:  # all, before the first is loaded for minutes
        if name not in presets:
            raise UserValueError(f"scorer: {name!r} is not in {path}. Choose from {', '.join(presets)}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Scorer, "scorer", required=True)
    configs = {}
    for name in names:
        try:
            configs[name] = parser.parse_object({"scorer": presets[name]})
        except ArgumentError as error:
            raise UserValueError(f"scorer: the entry of {name!r} in {path} does not fit: {error}") from error
    return {name: parser.instantiate(config).scorer for name, config in configs.items()}
