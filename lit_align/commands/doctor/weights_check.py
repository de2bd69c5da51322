"""Whether the pretrained weights of a run are here, without reading them."""

from huggingface_hub import constants

from lit_align.backbones import Backbone
from lit_align.backbones.loading.hub import Source, weight_files
from lit_align.commands.doctor.diagnosis import gigabytes
from lit_align.user_errors import UserFileNotFoundError

INDEX = "model_index.json"


def missing_config(repo: str, revision: str | None) -> str | None:
    """What is to be done before anything can be told of a pipeline that is not here; None where it is.

    Raises:
        FileNotFoundError: if a run would not find it either.
    """
    source = Source(repo, "", revision)
    if source.local:
        if source.find(INDEX) is None:
            raise UserFileNotFoundError(
                f"model.backbone.repo {repo!r} holds no {INDEX}. Name the folder of a diffusers pipeline."
            )
        return None
    if repo.startswith((".", "/", "~")) or repo.count("/") != 1:
        raise UserFileNotFoundError(
            f"model.backbone.repo {repo!r} is no folder, and no hub id (OWNER/NAME) either. Correct the path."
        )
    if source.find(INDEX, download=False) is not None:
        return None
    fetch = f"hf download {repo}{f' --revision {revision}' if revision else ''}"
    if constants.HF_HUB_OFFLINE:
        raise UserFileNotFoundError(
            f"model.backbone.repo {repo!r} is not in the local cache, and HF_HUB_OFFLINE forbids a download. Unset it, "
            f"or run on a machine with a network: {fetch}"
        )
    return f"{fetch} --include '*.json' --include '*.txt'"


def weight_line(source: Source, stem: str) -> str:
    """Where a model's weights are, and how large.

    Args:
        source: of the model.
        stem: name of its weights without suffix.

    Raises:
        FileNotFoundError: if a local folder lacks some.
    """
    try:
        files = weight_files(source, stem, download=False)
    except FileNotFoundError:
        if source.local or constants.HF_HUB_OFFLINE:
            raise
        return f"{source} is not in the local cache; fit would download it"
    return f"{gigabytes(sum(path.stat().st_size for path in files))} in {source}"


def weights_are_here(backbone: Backbone) -> bool:
    """Whether nothing would have to be downloaded."""
    try:
        return all(weight_files(*source, download=False) for source in backbone.sources().values())
    except FileNotFoundError:
        return False
