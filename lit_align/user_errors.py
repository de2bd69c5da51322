"""Errors that address the user: each message names the culprit, the value and the remedy.

The command line prints them without a traceback and ends with exit code 2. Any other exception is a fault of lit-align
or of a library, and keeps its traceback.
"""


class UserError(Exception):
    """A mistake, or a state of the machine, that the user can correct."""


class UserValueError(UserError, ValueError):
    """A setting, an input or a combination of them that cannot be used."""


class UserFileNotFoundError(UserError, FileNotFoundError):
    """A file or folder that is named and is not there."""


class UserFileExistsError(UserError, FileExistsError):
    """A file or folder that would be overwritten."""


class UserOSError(UserError, OSError):
    """A file that cannot be read or written."""


class UserRuntimeError(UserError, RuntimeError):
    """A process that cannot go on as it was started."""


class MissingPackageError(UserError, ModuleNotFoundError):
    """A package that an option needs and that is not installed."""
