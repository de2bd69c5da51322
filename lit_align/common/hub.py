"""Location of a model's files: a local folder, the hub's local cache, or the hub."""

from pathlib import Path
from typing import Any, NamedTuple

from lit_align.user_errors import UserFileNotFoundError


class ModelLocation(NamedTuple):
    """A pretrained model's folder, on this machine or on the hub."""

    repo: str  # hub id or local folder
    folder: str = ""  # within `repo`
    revision: str | None = None  # branch, tag or commit
    variant: str | None = None  # in the names of weight files, such as `fp16`

    @property
    def load_options(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained` and `load_config`, beside `repo`."""
        return {"subfolder": self.folder or None, "revision": self.revision}

    @property
    def is_local(self) -> bool:
        """Whether `repo` is a folder on this machine."""
        return Path(self.repo).is_dir()

    def find(self, name: str, download: bool = True) -> Path | None:
        """Find a file, downloading it if needed and if `download` is true; None where it is missing.

        Raises:
            FileNotFoundError: if `repo` is neither a folder nor a repository that the hub lets you read.
        """
        if self.is_local:
            path = Path(self.repo) / self.folder / name
            return path if path.is_file() else None
        # Imported here: it takes a third of a second, and a run on local folders never needs it.
        from huggingface_hub import errors, hf_hub_download

        where, here = self.folder or None, not download
        try:
            found = hf_hub_download(self.repo, name, subfolder=where, revision=self.revision, local_files_only=here)
        except errors.EntryNotFoundError:
            return None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
            raise UserFileNotFoundError(
                f"{self.repo!r} is neither a folder nor a repository of the hub that you can read. Check its name and "
                f"revision ({self.revision or 'main'}); for a private or gated repository run hf auth login."
            ) from error
        return Path(found)

    def require(self, name: str) -> Path:
        """Find a file, downloading it if needed.

        Raises:
            FileNotFoundError: if it cannot be found.
        """
        path = self.find(name)
        if path is None:
            raise self.missing(name)
        return path

    def missing(self, name: str) -> UserFileNotFoundError:
        """Return the error for a file that `find` did not find."""
        if self.is_local:
            return UserFileNotFoundError(f"{self} holds no {name}. Check repo, and filename where it is set.")
        if offline():
            return UserFileNotFoundError(
                f"{self} holds no {name} in the local cache, and HF_HUB_OFFLINE forbids a download. Unset it, or run "
                "once on a machine with a network."
            )
        return UserFileNotFoundError(
            f"{self} holds no {name}, or the hub cannot be reached. Check repo, and filename where it is set."
        )

    def __str__(self) -> str:
        return "/".join(part for part in (self.repo, self.folder) if part)


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids downloads."""
    from huggingface_hub import constants

    return constants.is_offline_mode()
