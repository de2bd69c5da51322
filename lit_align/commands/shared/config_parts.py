"""Parts of a training config, instantiated one by one."""

from typing import Any

from jsonargparse import ArgumentParser, Namespace


def arguments_of(parser: ArgumentParser, part: str, config: Namespace) -> dict[str, Any]:
    """Instantiate the arguments of a part's constructor.

    Args:
        parser: of `fit`.
        part: `model`, `data` or `trainer`.
        config: of the part, or some of its arguments.
    """
    made = parser.instantiate_classes(Namespace({part: config.clone()}), instantiate_groups=False)
    return dict(vars(made[part]))
