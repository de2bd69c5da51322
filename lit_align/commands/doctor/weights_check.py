"""Check that a run's pretrained weights are on this machine, without reading them."""

from lit_align.backbones import Backbone
from lit_align.backbones.loading.model_files import weight_files
from lit_align.common.hub import ModelLocation, offline
from lit_align.common.sizes import format_bytes
from lit_align.user_errors import UserFileNotFoundError

INDEX = "model_index.json"


def download_command(repo: str, revision: str | None) -> str | None:
    """Return the command that fetches a pipeline's configs; None where they are on this machine.

    Raises:
        FileNotFoundError: if a run would not find the pipeline either.
    """
    location = ModelLocation(repo, "", revision)
    if location.is_local:
        if location.find(INDEX) is None:
            raise UserFileNotFoundError(
                f"model.backbone.repo {repo!r} holds no {INDEX}. Name the folder of a diffusers pipeline."
            )
        return None
    if repo.startswith((".", "/", "~")) or repo.count("/") != 1:
        raise UserFileNotFoundError(
            f"model.backbone.repo {repo!r} is neither a folder nor a hub id (OWNER/NAME). Correct the path."
        )
    if location.find(INDEX, download=False) is not None:
        return None
    fetch = f"hf download {repo}{f' --revision {revision}' if revision else ''}"
    if offline():
        raise UserFileNotFoundError(
            f"model.backbone.repo {repo!r} is not in the local cache, and HF_HUB_OFFLINE forbids a download. Unset it, "
            f"or run on a machine with a network: {fetch}"
        )
    return f"{fetch} --include '*.json' --include '*.txt'"


def weight_lines(name: str, location: ModelLocation, stem: str) -> list[str]:
    """Describe where a model's weights are and how large they are.

    Args:
        name: name of the model in the report.
        location: location of its files.
        stem: name of its weight files without suffix.

    Raises:
        FileNotFoundError: if they are missing and cannot be downloaded.
    """
    try:
        files = weight_files(location, stem, download=False)
    except FileNotFoundError:
        if location.is_local or offline():
            raise
        return [f"{name}: {location} is not in the local cache; fit would download it"]
    return [f"{name}: {format_bytes(sum(path.stat().st_size for path in files))} in {location}"]


def weights_are_here(backbone: Backbone) -> bool:
    """Whether all weights of the backbone are on this machine."""
    try:
        return all(weight_files(*model, download=False) for model in backbone.model_locations().values())
    except FileNotFoundError:
        return False
