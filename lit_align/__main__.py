"""The entry point: explains a user's mistake in a few lines, and keeps the exit code of a rank that fails."""

import logging
import os
import signal
import sys
import warnings
from contextlib import suppress

from lit_align.cli import main as run_command

HARMLESS = (
    r".*module\(s\) in eval mode at the start of training.*",  # frozen parts are meant to be
    r".*isinstance\(treespec, LeafSpec\).* is deprecated.*",  # lightning 2.6 on torch 2.13
    r".*It is recommended to use `self.log\(.*sync_dist=True.*",  # our metrics are reduced over ranks already
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Exit codes: 2 for a mistake that the user can correct, 1 with a traceback for any other error, 130 for Ctrl-C.
    `LIT_ALIGN_DEBUG=1` shows the traceback of both.
    """
    quiet_libraries()
    see_working_directory()
    try:
        run_command(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        ignore_signals()
        from lit_align.commands.shared.mistakes import explain

        lines = explain(error)
        if lines is None or os.environ.get("LIT_ALIGN_DEBUG"):
            raise
        print(f"{rank_prefix()}lit-align: {lines}", file=sys.stderr)
        sys.exit(2)


def quiet_libraries() -> None:
    """Silence what is not for the user, before the libraries that say it are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # image processors that we do not use miss torchvision
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its CPU kernels are optional
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)


def see_working_directory() -> None:
    """Let options name classes of files in the working directory, as `python -m lit_align` does."""
    if not sys.flags.safe_path:  # python -P, PYTHONSAFEPATH
        with suppress(FileNotFoundError):  # a folder that was deleted
            folder = os.getcwd()
            sys.path += [] if folder in sys.path else [folder]  # last, so that no file there hides a package


def ignore_signals() -> None:
    """SLURM ends the other ranks of a failed run; a rank that fails itself exits with the code of its own error."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def rank_prefix() -> str:
    """Name the process, where several of them may fail."""
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), None)
    return "" if rank is None else f"[rank {rank}] "


if __name__ == "__main__":
    main()
