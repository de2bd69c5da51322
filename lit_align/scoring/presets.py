"""Load scorers by their names in a YAML file of presets."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lit_align.scoring.base import Scorer
from lit_align.user_errors import UserValueError

PRESETS = Path(__file__).with_name("presets.yaml")


def scorer_names(scorers: str | Sequence[str]) -> list[str]:
    """Return unique scorer names from a list or from comma-separated text.

    Raises:
        ValueError: if there are none.
    """
    listed = scorers.split(",") if isinstance(scorers, str) else scorers
    names = list(dict.fromkeys(name.strip() for name in listed if name.strip()))
    if not names:
        raise UserValueError("scorers is empty; name at least one, such as hpsv2.1,pickscore.")
    return names


def load_scorers(names: Sequence[str], path: Path | None = None) -> dict[str, Scorer]:
    """Load scorers with their weights, in the order of `names`.

    Args:
        names: entries of the file.
        path: YAML file with a class_path and init_args per name; None uses the presets of this package. Relative
            folders in it start at the working directory.

    Raises:
        ValueError: if a name is not in the file, or if its entry does not fit its class.
    """
    path = PRESETS if path is None else path
    presets = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    for name in names:  # checked before loading, which takes minutes
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
