"""What a folder was begun with, so that it is gone on with alike."""

import json
from pathlib import Path
from typing import Any

from lit_align.commands.shared.process_group import ProcessGroup
from lit_align.common.files import write_text
from lit_align.user_errors import UserValueError

FORMAT = 1


def settle_plan(path: Path, plan: dict[str, Any], group: ProcessGroup, made: str = "*.tar") -> None:
    """Write down what is to be done, or see that the folder was begun with the same.

    Args:
        path: of the plan, in the folder.
        plan: plain values.
        group: of this process.
        made: pattern of the files that are made; without a plan there must be none.

    Raises:
        ValueError: if it was begun with something else.
    """
    text = json.dumps({"format": FORMAT, **plan}, indent=1, ensure_ascii=False) + "\n"
    if path.is_file():
        compare_plans(path, read_plan(path), json.loads(text))
        return
    if any(path.parent.glob(made)):
        raise UserValueError(
            f"output: {path.parent} holds {made}, but no {path.name} that says what they are. Choose another folder."
        )
    # Every process writes it, for any may be the first to need it: each under a name of its own until it is whole.
    own = path.with_name(f"{path.name}.{group.rank}")
    write_text(own, text)
    own.replace(path)


def read_plan(path: Path) -> Any:
    """What a folder says of itself.

    Raises:
        ValueError: if it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserValueError(f"output: {path} cannot be read: {error}. Choose another folder.") from error


def compare_plans(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise a ValueError that names what has changed since the folder of `path` was begun."""
    before, now = _flat(old), _flat(new)
    changes = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in before | now
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise UserValueError(
            f"output: {path.parent} was begun otherwise: {'; '.join(changes)}. Choose another folder, or say what it "
            "was begun with to go on."
        )


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dots in its names."""
    if not isinstance(values, dict):
        return {name: values}
    inner = (_flat(value, f"{name}.{part}" if name else part) for part, value in values.items())
    return {key: value for part in inner for key, value in part.items()}
