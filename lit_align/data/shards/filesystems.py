"""Paths that may be local, a URL of any fsspec filesystem, or a `pipe:` command."""

from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec

from lit_align.user_errors import MissingPackageError

PIPE = "pipe:"
SILENCE = 60  # seconds without a byte after which a web server is asked again
EXTRAS = {"s3fs": "s3", "gcsfs": "gcs"}  # packages behind fsspec, and the extras that install them


def is_url(path: str) -> bool:
    """Whether a path is a URL or a `pipe:` command, not a local file."""
    return path.startswith(PIPE) or "://" in path


def join(folder: str, name: str) -> str:
    """Join a folder, which may be a URL, and a name; a URL or an absolute path as name is returned unchanged."""
    if is_url(name) or Path(name).is_absolute():
        return name
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def parent(path: str) -> str:
    """The folder of a file, which may be a URL."""
    return path.rsplit("/", 1)[0] if is_url(path) else str(Path(path).parent)


def filesystem_of(url: str) -> tuple[Any, str]:
    """Open the fsspec filesystem of a URL, and return it with the file's name in it.

    Raises:
        MissingPackageError: if the package for this kind of URL is not installed.
    """
    try:
        filesystem, name = fsspec.core.url_to_fs(url, **_options(url))
    except ImportError as error:
        package = next((package for package in EXTRAS if package in str(error)), None)
        remedy = f" Install {package}, lit-align's extra {EXTRAS[package]}." if package else ""
        raise MissingPackageError(f"{url!r} cannot be read: {error}.{remedy}") from error
    return filesystem, name


def _options(url: str) -> dict[str, Any]:
    """Allow a web server any time for a file, where aiohttp ends every request after five minutes."""
    if not url.startswith(("http:", "https:")):
        return {}
    timeout = import_module("aiohttp").ClientTimeout(total=None, sock_connect=30, sock_read=SILENCE)
    return {"client_kwargs": {"timeout": timeout}}
