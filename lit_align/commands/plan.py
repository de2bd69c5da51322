"""What a folder of generated shards was begun with, so that it is gone on with alike."""

import json
from pathlib import Path
from typing import Any

from lit_align.commands.place import Place
from lit_align.data.writing import write_text

PLAN = "generate.json"
FORMAT = 1


def settle_plan(folder: Path, plan: dict[str, Any], place: Place) -> None:
    """Write down what is to be done, or see that the folder was begun with the same.

    Raises:
        ValueError: if it was begun with something else.
    """
    path = folder / PLAN
    text = json.dumps({"format": FORMAT, **plan}, indent=1, ensure_ascii=False) + "\n"
    if path.is_file():
        _compare(path, json.loads(text))
        return
    if any(folder.glob("*.tar")):
        raise ValueError(
            f"output: {folder} holds shards, but no {PLAN} that says what they are. Choose another folder."
        )
    # Every process writes it, for any may be the first to need it: each under a name of its own until it is whole.
    own = folder / f"{PLAN}.{place.rank}"
    write_text(own, text)
    own.replace(path)


def _compare(path: Path, plan: dict[str, Any]) -> None:
    try:
        old, new = _flat(json.loads(path.read_text(encoding="utf-8"))), _flat(plan)
    except ValueError as error:
        raise ValueError(f"output: {path} cannot be read: {error}. Choose another folder.") from error
    changes = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in old | new if old.get(name) != new.get(name)
    ]
    if changes:
        raise ValueError(
            f"output: {path.parent} was begun otherwise: {'; '.join(changes)}. Choose another folder, or say what it "
            "was begun with to go on."
        )


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dots in its names."""
    if not isinstance(values, dict):
        return {name: values}
    inner = (_flat(value, f"{name}.{part}" if name else part) for part, value in values.items())
    return {key: value for part in inner for key, value in part.items()}
